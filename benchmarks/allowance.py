"""How long a program may take, and what is too slow for it: products in bf16 may be 50 times as slow as in fp32."""

from __future__ import annotations

import math
import time
from functools import cache

import torch
from torch.nn import functional as F

SHARE = 0.75  # of a point's time that slow ways may take together
LEFT_OUT = "left out: "
_SIDE = 256  # of the products by which slow ways are predicted


class Allowance:
    """How long a program may take, and the point that it is at.

    Attributes:
        end: when no further point starts, on the monotonic clock.
        of_point: when the current point starts no further round.
        free: seconds of the current point that slow ways may still take.
    """

    def __init__(self) -> None:
        self.end = self.of_point = self.free = math.inf

    def begin(self, minutes: float | None) -> None:
        """The program begins; None is without end."""
        self.end = self.of_point = self.free = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def begin_point(self, left: int) -> bool:
        """The first of so many points begins, with an equal part of the time; False if there is none."""
        now = time.monotonic()
        self.of_point = now + (self.end - now) / left
        self.free = SHARE * (self.of_point - now)
        return now < self.end

    @property
    def is_late(self) -> bool:
        """Whether the current point has had its time."""
        return time.monotonic() > self.of_point

    def refuse(self, flops: float, flops_per_second: float, passes: int) -> str | None:
        """The reason to leave a way out at the current point, for its row; None if it may run, and its time is taken.

        Args:
            flops: of one pass.
            flops_per_second: at which they are computed.
            passes: that are needed for one measurement, checks and warm-up included.
        """
        seconds = flops / flops_per_second
        if passes * seconds > self.free:
            return f"{LEFT_OUT}one pass takes about {seconds:.2g} s"
        self.free -= passes * seconds
        return None


ALLOWANCE = Allowance()


@cache
def torch_rate(dtype: torch.dtype, backward: bool = False) -> float:
    """FLOPs per second of `F.linear` on a CPU, with its backward pass or without."""
    x, weight = (torch.ones(_SIDE, _SIDE, dtype=dtype, requires_grad=backward) for _ in range(2))
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        y = F.linear(x, weight)
        if backward:
            y.backward(torch.ones_like(y))
        taken.append(time.perf_counter() - begun)
    return (3 if backward else 1) * 2 * _SIDE**3 / min(taken)
