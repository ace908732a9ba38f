"""Every law of `moeify.testing` can fail: for each there is a part that breaks it, and sound parts break none."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from laws import broken
from moeify import MoE
from moeify.context import Context
from moeify.experts import FFN, Experts
from moeify.kernels import grouped_linear
from moeify.routers import Router, TopK, real_tokens
from moeify.routing import Assignment, Choices, Evidence
from moeify.testing import BrokenLaw, check_experts, check_router, experts, routers


class Sound(Router):
    """Top-2 of a softmax, written out so that parts can be exchanged."""

    weights_sum_to_one = True

    def __init__(self, width, num_experts):
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, width))

    def logits(self, tokens):
        return tokens.x.float() @ self.weight.float().t()

    def forward(self, x, context):
        tokens = real_tokens(x, context)
        with torch.autocast("cpu", enabled=False):
            logits = self.logits(tokens)
        top = logits.topk(2)
        return tokens.assign(top.indices, top.values.softmax(-1), self.num_experts, Evidence(logits=logits))


class ReturnsATuple(Sound):
    def forward(self, x, context):
        return (super().forward(x, context),)


class PutsRowsAtOtherExperts(Sound):
    def forward(self, x, context):
        routing = super().forward(x, context)
        return replace(routing, choices=Choices(indices=(routing.choices.indices + 1) % 4, weights=routing.weight))


class ForgetsTheMask(Sound):
    def forward(self, x, context):
        alone = Context()
        alone.call.inputs.update(context.call.inputs)
        alone.call.batch_first = context.call.batch_first
        return super().forward(x, alone)


class DrawsNoiseForPadding(Sound):
    def forward(self, x, context):
        noise = torch.randn(x.shape).flatten(0, -2)
        positions = context.real(len(noise))
        self.noise = noise if positions is None else noise[positions]
        return super().forward(x, context)

    def logits(self, tokens):
        return super().logits(replace(tokens, x=tokens.x + self.noise) if self.training else tokens)


class CountsPositions(Sound):
    def logits(self, tokens):
        bias = torch.zeros(len(tokens.x), self.num_experts)
        for members in tokens.members():
            bias[members[::2], 0] = 5.0
        return super().logits(tokens) + bias


class SubtractsTheMeanOfTheBatch(Sound):
    causal = False

    def logits(self, tokens):
        logits = super().logits(tokens)
        return logits - logits.mean(0)


class SubtractsTheMeanOfTheSequence(Sound):
    def logits(self, tokens):
        logits = super().logits(tokens)
        means = torch.zeros_like(logits)
        for members in tokens.members():
            means[members] = logits[members].mean(0)
        return logits - means


class TakesRowsForSequences(Sound):
    causal = False

    def logits(self, tokens):
        logits = super().logits(tokens)
        rows = torch.zeros_like(tokens.sequence_id) if tokens.shape[0] == 1 else tokens.sequence_id
        return logits - torch.stack([logits[rows == row].mean(0) for row in rows])


class SaysItLooksAhead(Sound):
    causal = False


class SaysNothingOfItsSums(Sound):
    weights_sum_to_one = False


class HasAnIdleParameter(Sound):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.idle = nn.Parameter(torch.zeros(3))


class RoundsItsLogits(Sound):
    def logits(self, tokens):
        return (tokens.x @ self.weight.t()).float()


class KeepsFp32(Assignment):
    def combine(self, rows):
        return super().combine(rows).float()


class ReturnsFp32(Sound):
    def forward(self, x, context):
        return KeepsFp32(**vars(super().forward(x, context)))


class AlwaysDraws(Sound):
    def logits(self, tokens):
        return super().logits(tokens) * (1 + 0.5 * torch.rand(()))


class HidesItsState(Sound):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.offset = torch.randn(self.num_experts)

    def logits(self, tokens):
        return super().logits(tokens) + self.offset


class BreaksTheGraph(Sound):
    def logits(self, tokens):
        return super().logits(tokens) if float(tokens.x.sum()) < 1e9 else tokens.x


WRONG_ROUTERS = {
    PutsRowsAtOtherExperts: ("token", "a_decision_is_a_map_to_sorted_rows_and_back"),
    ForgetsTheMask: ("token", "padding_is_not_assigned"),
    DrawsNoiseForPadding: ("token", "more_padding_changes_nothing"),
    CountsPositions: ("token", "the_order_of_tokens_does_not_matter"),
    SubtractsTheMeanOfTheBatch: ("sequence", "sequences_do_not_see_each_other"),
    TakesRowsForSequences: ("sequence", "sequences_do_not_see_each_other"),
    SubtractsTheMeanOfTheSequence: ("sequence", "causal_is_declared_truthfully"),
    SaysItLooksAhead: ("token", "causal_is_declared_truthfully"),
    SaysNothingOfItsSums: ("token", "weights_sum_to_one_is_declared_truthfully"),
    partial(TopK, normalize=False): ("token", "weights_sum_to_one_is_declared_truthfully"),
    HasAnIdleParameter: ("token", "a_gradient_reaches_every_parameter"),
    RoundsItsLogits: ("token", "decisions_are_computed_in_fp32"),
    ReturnsFp32: ("token", "half_precision_works"),
    AlwaysDraws: ("token", "evaluation_is_deterministic"),
    HidesItsState: ("token", "copies_and_saved_states_decide_alike"),
}


@pytest.mark.parametrize("router", WRONG_ROUTERS)
def test_a_router_that_breaks_a_law_is_caught_by_this_law_alone(router):
    sees, law = WRONG_ROUTERS[router]
    make = router
    if isinstance(router, partial):

        def make(*sizes):
            made = router(*sizes)
            made.weights_sum_to_one = True
            return made

    assert broken(check_router, routers.LAWS, make, sees=sees) == {law}


def test_every_law_of_routers_can_fail():
    assert {law for _, law in WRONG_ROUTERS.values()} == {law.__name__ for law in routers.LAWS}


def test_a_sound_router_breaks_no_law_and_compiles():
    check_router(Sound, compiles=True)


def test_a_router_that_does_not_compile_is_caught_where_this_is_asked_for():
    check_router(BreaksTheGraph)
    with pytest.raises(BrokenLaw, match="torch compile captures the router"):
        check_router(BreaksTheGraph, compiles=True)


def test_what_is_no_decision_is_named():
    with pytest.raises(BrokenLaw, match=r"rows and back: forward returned a tuple; return a moeify\.Routing"):
        check_router(ReturnsATuple)


class Maps(Experts):
    """E linear maps."""

    def __init__(self, num_experts, width):
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, width, width) / 3)

    def forward(self, rows, counts):
        return grouped_linear(rows, self.weight, counts)


class OneCostForAll(Maps):
    @property
    def costs(self):
        return torch.ones(1)


class MixesRows(Maps):
    def forward(self, rows, counts):
        out = super().forward(rows, counts)
        return out - out.mean(0, keepdim=True)


class LeavesEmptyRows(Maps):
    """Uninitialised memory where a call has one expert only."""

    def forward(self, rows, counts):
        out = super().forward(rows, counts)
        return out + 0 * torch.empty_like(out) if len(rows) == 7 else out


class ExpertsFirst(Maps):
    def all_outputs(self, x):
        return super().all_outputs(x).transpose(0, 1)


class Detaches(Maps):
    def forward(self, rows, counts):
        return super().forward(rows.detach(), counts) + 0 * rows


class HasAnIdleWeight(Maps):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.idle = nn.Parameter(torch.ones(3))


class ReturnsFp32Rows(Maps):
    def forward(self, rows, counts):
        return super().forward(rows, counts).float() if rows.dtype == torch.bfloat16 else super().forward(rows, counts)


class AlwaysDrops(Maps):
    def forward(self, rows, counts):
        return nn.functional.dropout(super().forward(rows, counts), 0.3)


class HidesItsScale(Maps):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = torch.rand(()).item()

    def forward(self, rows, counts):
        return super().forward(rows, counts) * self.scale


class DoesMoreThanItsWeights(Experts):
    def __init__(self, num_experts, width):
        super().__init__()
        self.num_experts, self.inner = num_experts, FFN(num_experts, width, 6)

    @property
    def stacked(self):
        return self.inner.stacked

    def forward(self, rows, counts):
        return 2 * self.inner(rows, counts)


ROWS, ALL_OUTPUTS = "a_row_depends_on_its_own_expert_alone", "all_outputs_are_those_of_every_expert"
GRADIENTS, COPIES = "gradients_are_those_of_the_outputs", "copies_and_saved_states_have_the_same_outputs"
WRONG_EXPERTS = {
    OneCostForAll: {"an_output_per_row"},
    MixesRows: {ROWS, ALL_OUTPUTS, GRADIENTS},
    LeavesEmptyRows: {ROWS},
    ExpertsFirst: {ALL_OUTPUTS},
    Detaches: {GRADIENTS},
    HasAnIdleWeight: {GRADIENTS},
    ReturnsFp32Rows: {"half_precision_works"},
    AlwaysDrops: {"evaluation_is_deterministic", COPIES, "half_precision_works", ROWS, ALL_OUTPUTS, GRADIENTS},
    HidesItsScale: {COPIES},
    DoesMoreThanItsWeights: {"stacked_weights_are_all_there_is"},
}


@pytest.mark.parametrize("make", WRONG_EXPERTS)
def test_experts_that_break_a_law_are_caught_by_this_law_alone(make):
    assert broken(check_experts, experts.LAWS, make) == WRONG_EXPERTS[make]


def test_every_law_of_experts_can_fail_and_sound_ones_break_none():
    assert set().union(*WRONG_EXPERTS.values()) == {law.__name__ for law in experts.LAWS}
    check_experts(Maps)


def test_a_message_names_the_law_what_was_seen_and_what_to_do():
    with pytest.raises(BrokenLaw) as caught:
        check_router(ForgetsTheMask)
    assert str(caught.value) == (
        "padding is not assigned: 18 of 40 rows read padding; route real_tokens(x, context).x only, and let its "
        "assign() make the rows"
    )


def test_a_law_that_does_not_exist_cannot_be_left_out():
    with pytest.raises(ValueError, match=r"no law is called 'half_precision'; did you mean 'half_precision_works'"):
        check_router(Sound, without=["half_precision"])


def test_checks_leave_random_numbers_and_settings_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_router(Sound)
    check_experts(Maps)
    assert torch.equal(torch.rand(4), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert MoE(Sound(8, 4), Maps(4, 8))(torch.randn(3, 8)).requires_grad
