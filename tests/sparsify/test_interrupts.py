"""An interrupt of `sparsify`, wherever it comes, leaves the model and the random numbers as they were."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import moeify
from moeify.context import running
from moeify.sparsify import Recipe, find, sparsify
from plain_models import blocks

SOURCE = str(Path(moeify.__file__).parent)


def is_with(frame) -> bool:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


class Interrupt:
    """Raises when the given number of lines of moeify have run, and counts them.

    Not at a `with`: Python comes back to its line to leave it, and what is raised there never reaches its end.
    """

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.lines, self.raises = at, error, 0, at > 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.lines += 1
            if self.raises and self.lines >= self.at and not is_with(frame):
                self.raises = False
                sys.settrace(None)
                raise self.error
        return self

    def run(self, action) -> bool:
        """Whether the action was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            action()
        except self.error:
            return True
        finally:
            sys.settrace(before)
        return False


def everything(model: nn.Module) -> list:
    """What a model consists of, by identity, and the values of its tensors and of the random numbers."""
    found: list = [torch.get_rng_state().tolist()]
    for name, part in model.named_modules():
        own = {
            key: tuple((k, id(v)) for k, v in value.items()) if isinstance(value, dict) else id(value)
            for key, value in vars(part).items()
        }
        found.append((name, id(part), type(part), part.training, own))
    found += [(name, p.requires_grad, p.detach().clone().tolist()) for name, p in model.named_parameters()]
    return found + [(name, b.tolist()) for name, b in model.named_buffers()]


def model() -> nn.Module:
    made = nn.Sequential(*blocks(2), nn.BatchNorm1d(5))
    made[0].eval()
    made[1].ffn.requires_grad_(False)
    return made


PROBE = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
ACTIONS = {
    "sparsify": lambda model: sparsify(model, Recipe(num_experts=2), probe=PROBE, verbose=False),
    "find and apply": lambda model: find(model, Recipe(num_experts=2)).apply(),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(action, error):
    whole = Interrupt(0, error)
    assert not whole.run(lambda: ACTIONS[action](model()))
    dense = model()
    before = everything(dense)
    offset = 0 if error is KeyboardInterrupt else 1  # other lines for the other error
    for at in range(1 + offset, whole.lines, whole.lines // 14):
        assert Interrupt(at, error).run(lambda: ACTIONS[action](dense)), at
        assert everything(dense) == before, f"after line {at} of {whole.lines}"
        assert running() == _get_current_function_mode_stack() == [], f"after line {at} of {whole.lines}"
    ACTIONS[action](dense)
    assert everything(dense) != before
