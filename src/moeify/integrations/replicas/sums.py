"""What replicas of a training sum before a step counts: gradients, and what forward passes change in buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_BUCKET = 2**23  # numbers that are summed at once


def sum_gradients(model: nn.Module, add: Callable[[Tensor], None]) -> None:
    """Sum the gradients over all replicas, in fp32.

    A parameter has none only if it has none in any replica, as that of an expert without a token. In torchft's
    `DistributedDataParallel` such a parameter stays as it is in the replicas without a token, and moves in the others.

    Args:
        model: after backward.
        add: sums a tensor over the replicas in place.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    add(used)
    for bucket in _buckets([p for p, replicas in zip(parameters, used.tolist(), strict=True) if replicas]):
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.flatten().float() for part in parts])
        add(flat)
        for p, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = summed.view_as(p).to(p.dtype, copy=True)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in groups of about `_BUCKET` numbers."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


class Buffers:
    """The buffers of a model as they were before a step, for what forward passes change in them.

    Such are running means: those of batch normalisation, and `moeify.routers.DefaultVector`'s.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}

    def keep(self) -> None:
        """Copy what has changed since the last copy."""
        live = dict(self._model.named_buffers())
        moved = [name for name in live if name not in self._kept or self._has_moved(name, live[name])]
        self._kept |= {name: (live[name], live[name]._version, live[name].clone()) for name in moved}
        self._kept = {name: self._kept[name] for name in live}

    def _has_moved(self, name: str, buffer: Tensor) -> bool:
        kept, version, _ = self._kept[name]
        return kept is not buffer or kept._version != version

    @torch.no_grad()
    def average(self, add: Callable[[Tensor], None], replicas: int) -> None:
        """Move every buffer that forward passes moved by the mean of its moves in all replicas."""
        live = dict(self._model.named_buffers())
        if not live:
            return
        moved = torch.tensor([float(self._has_moved(name, live[name])) for name in live])
        moved = moved.to(next(iter(live.values())).device)
        add(moved)
        for name, anywhere in zip(live, moved.tolist(), strict=True):
            if anywhere:
                buffer, before = live[name], self._kept[name][2].double()
                change = buffer.double() - before
                add(change)
                after = before + change / max(replicas, 1)
                buffer.copy_(after if buffer.is_floating_point() else after.round())

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what the forward passes of a step did."""
        for name, buffer in self._model.named_buffers():
            if name in self._kept and self._has_moved(name, buffer):
                buffer.copy_(self._kept[name][2])
