"""The laws (invariants) of experts, and `check_experts`, which checks custom experts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.experts.base import Experts
from moeify.kernels import naive_grouped_linear
from moeify.testing.laws import (
    BrokenLaw,
    check_laws,
    difference,
    gradients,
    trainable,
    uninitialised_memory_is_nan,
)

_WIDTH, _EXPERTS = 8, 4
_COUNTS = ((3, 0, 5, 2), (0, 0, 7, 0), (1, 1, 1, 1), (0, 0, 0, 0))


def check_experts(make: Callable[[int, int], Experts], *, without: Collection[str] = ()) -> None:
    """Check that experts satisfy the laws of experts.

    They are built for 4 experts and 8-dimensional tokens. Parameters that are initialised to zero are drawn from a
    normal distribution, so that the outputs of low-rank experts are not zero.

    Args:
        make: (experts, width) -> experts.
        without: names of laws that the method violates by design.

    Raises:
        BrokenLaw: the first law that is violated; an AssertionError.
        ValueError: a name in `without` that no law has.
    """
    check_laws(LAWS, _Subject(make), without)


@dataclass(frozen=True)
class _Subject:
    """Experts under test."""

    make: Callable[[int, int], Experts]

    def experts(self) -> Experts:
        """New experts, in evaluation mode."""
        experts = self.make(_EXPERTS, _WIDTH)
        for parameter in experts.parameters():
            if not parameter.count_nonzero():
                nn.init.normal_(parameter, std=0.1)
        return experts.eval()


def _one_by_one(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """The outputs of all rows, each computed by a separate call."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.cat(
        [experts(rows[r : r + 1], torch.bincount(e[None], minlength=len(counts))) for r, e in enumerate(owner)]
    )


def an_output_per_row(subject: _Subject) -> None:
    """`num_experts` and `costs` are correct, and outputs are (R, O) in the dtype of the rows, also for R = 0."""
    law, experts = "an_output_per_row", subject.experts()
    if experts.num_experts != _EXPERTS or experts.costs.shape != (_EXPERTS,):
        seen = f"num_experts is {experts.num_experts} and costs have shape {tuple(experts.costs.shape)}"
        raise BrokenLaw(law, f"{seen} for {_EXPERTS} experts", "set num_experts, and give a cost for each")
    widths = set()
    for counts in _COUNTS:
        rows = torch.randn(sum(counts), _WIDTH)
        out = experts(rows, torch.tensor(counts))
        widths.add(out.shape[-1])
        if out.dim() != 2 or len(out) != len(rows) or out.dtype != rows.dtype or len(widths) > 1:
            seen = f"{len(rows)} rows for experts {counts} gave {tuple(out.shape)} in {out.dtype}"
            raise BrokenLaw(law, seen, "return a row of the same width for every row, also for none")


def a_row_depends_on_its_own_expert_alone(subject: _Subject) -> None:
    """Outputs of a batch of rows equal those of single rows, also if some experts have no rows."""
    experts = subject.experts()
    with uninitialised_memory_is_nan(), torch.no_grad():
        for counts in _COUNTS[:3]:
            rows, numbers = torch.randn(sum(counts), _WIDTH), torch.tensor(counts)
            if (error := difference(experts(rows, numbers), _one_by_one(experts, rows, numbers))) > 1e-5:
                raise BrokenLaw(
                    "a_row_depends_on_its_own_expert_alone",
                    f"rows for experts {counts} differ by {error:.2g} from one row at a time",
                    "compute counts[0] rows by expert 0, the next counts[1] by expert 1; let rows not see each other",
                )


def all_outputs_are_those_of_every_expert(subject: _Subject) -> None:
    """`all_outputs(x)[t, e]` is the output of expert e for token t."""
    experts, x = subject.experts(), torch.randn(3, _WIDTH)
    with torch.no_grad():
        rows = x.repeat(_EXPERTS, 1)
        slow = _one_by_one(experts, rows, torch.full((_EXPERTS,), 3)).unflatten(0, (_EXPERTS, 3)).transpose(0, 1)
        if (error := difference(experts.all_outputs(x), slow)) > 1e-5:
            seen = f"all_outputs differs by {error:.2g} from the experts' own outputs"
            raise BrokenLaw("all_outputs_are_those_of_every_expert", seen, "return (T, E, O), tokens first")


def gradients_are_those_of_the_outputs(subject: _Subject) -> None:
    """Gradients agree with finite differences and with those of single rows, and are not zero for any parameter."""
    law, experts = "gradients_are_those_of_the_outputs", subject.experts()
    parameters = trainable(experts)
    moved = dict.fromkeys(parameters, False)
    for counts in ((3, 0, 5, 2), (2, 4, 1, 3)):
        rows, numbers = torch.randn(sum(counts), _WIDTH, requires_grad=True), torch.tensor(counts)
        leaves = [rows, *parameters.values()]
        with uninitialised_memory_is_nan():
            fast = gradients(experts(rows, numbers), leaves)
            slow = gradients(_one_by_one(experts, rows, numbers), leaves)
        for name, a, b in zip(["the rows", *parameters], fast, slow, strict=True):
            if (error := difference(a, b)) > 1e-5:
                seen = f"the gradient of {name} differs by {error:.2g} from that of one row at a time"
                raise BrokenLaw(law, seen, "derive backward from the definition, one row at a time")
            if name in moved:
                moved[name] |= bool(a.count_nonzero())
    _must_be_derivatives(law, experts)
    if dead := [name for name, has in moved.items() if not has]:
        raise BrokenLaw(law, f"no gradient reaches {', '.join(dead)}", "use it, or set requires_grad = False")


def _must_be_derivatives(law: str, experts: Experts, step: float = 1e-3) -> None:
    """Compare gradients with central differences along a random direction, in fp64."""
    experts, counts = deepcopy(experts).double(), torch.tensor(_COUNTS[0])
    rows = torch.randn(10, _WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = {"the rows": rows, **trainable(experts)}
    exact = gradients(experts(rows, counts), list(leaves.values()))
    with torch.no_grad():
        weight = torch.randn(
            experts(rows, counts).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        for (name, leaf), gradient in zip(leaves.items(), exact, strict=True):
            direction, ends = torch.randn_like(leaf), []
            for sign in (1, -2):
                leaf.add_(direction, alpha=sign * step)
                ends.append((experts(rows, counts) * weight).sum())
            leaf.add_(direction, alpha=step)
            slope = (ends[0] - ends[1]) / (2 * step)
            if (error := difference((gradient * direction).sum(), slope)) > 5e-3:
                seen = f"the gradient of {name} differs by {error:.2g} from what the outputs do"
                raise BrokenLaw(law, seen, "derive backward from forward, and detach nothing")


def half_precision_works(subject: _Subject) -> None:
    """In bf16, outputs are in bf16 and close to those in fp32."""
    experts, rows, counts = subject.experts(), torch.randn(10, _WIDTH), torch.tensor(_COUNTS[0])
    half = deepcopy(experts).to(torch.bfloat16)
    out, exact = half(rows.to(torch.bfloat16), counts), experts(rows, counts)
    if out.dtype != torch.bfloat16 or (error := difference(out, exact)) > 0.1:
        seen = f"outputs are in {out.dtype}" if out.dtype != torch.bfloat16 else f"outputs differ by {error:.2g}"
        raise BrokenLaw("half_precision_works", seen, "compute in the dtype of the rows, or cast back to it")


def evaluation_is_deterministic(subject: _Subject) -> None:
    """In evaluation mode, outputs do not depend on the state of the random generators."""
    experts, rows, counts = subject.experts(), torch.randn(10, _WIDTH), torch.tensor(_COUNTS[0])
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(experts(rows, counts))
    if (error := difference(*outputs)) > 0:
        seen = f"two calls differ by {error:.2g}"
        raise BrokenLaw("evaluation_is_deterministic", seen, "let dropout and masks read self.training")


def copies_and_saved_states_have_the_same_outputs(subject: _Subject) -> None:
    """A deep copy, and new experts with the same state dict, have the same outputs."""
    experts, rows, counts = subject.experts(), torch.randn(10, _WIDTH), torch.tensor(_COUNTS[0])
    torch.manual_seed(1)
    restored = subject.experts()
    restored.load_state_dict(experts.state_dict())
    y = experts(rows, counts)
    for what, other in (("a deep copy", deepcopy(experts)), ("experts with the saved state", restored)):
        if (error := difference(other(rows, counts), y)) > 0:
            seen = f"outputs of {what} differ by {error:.2g}"
            raise BrokenLaw(
                "copies_and_saved_states_have_the_same_outputs", seen, "keep what outputs need as parameters or buffers"
            )


def stacked_weights_are_all_there_is(subject: _Subject) -> None:
    """Experts with `stacked` weights compute exactly down(activation(up(row))), which kernels rely on."""
    experts, rows, counts = subject.experts(), torch.randn(10, _WIDTH), torch.tensor(_COUNTS[0])
    if (s := experts.stacked) is None:
        return
    hidden = s.activation(naive_grouped_linear(rows, s.up, counts, s.up_bias))
    if (error := difference(experts(rows, counts), naive_grouped_linear(hidden, s.down, counts, s.down_bias))) > 1e-5:
        seen = f"outputs differ by {error:.2g} from those of the stacked weights"
        raise BrokenLaw("stacked_weights_are_all_there_is", seen, "let stacked be None where forward does more")


LAWS = [
    an_output_per_row,
    a_row_depends_on_its_own_expert_alone,
    all_outputs_are_those_of_every_expert,
    gradients_are_those_of_the_outputs,
    half_precision_works,
    evaluation_is_deterministic,
    copies_and_saved_states_have_the_same_outputs,
    stacked_weights_are_all_there_is,
]
