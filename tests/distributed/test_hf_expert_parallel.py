"""transformers' own engine with moeify's dispatch: the same losses and gradients as on one process."""

import pytest

from distributed import equal
from moeify import Recipe, sparsify
from moeify.catalogue import catalogue
from moeify.parallel import CannotBeParallel, expert_plan
from nights import nightly
from tiny_models import causal_lm, mixtral

EXPERTS = {"fsdp_size": 2, "ep_size": 2}


@pytest.fixture(scope="module", autouse=True)
def _loaded(ranks):
    ranks.preload("moeify.parallel", "transformers.models.llama.modeling_llama")


def test_a_plan_names_every_parameter_of_the_experts():
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)
    assert expert_plan(model, 2) == {
        "model.layers.*.mlp.experts": "ep_dispatch_experts",
        "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
    }
    assert expert_plan(mixtral(), 2) == {}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", EXPERTS),
        ("mixtral", EXPERTS),
        ("deepseek_v3", EXPERTS),
        ("capacity", EXPERTS),
        ("soft", EXPERTS),
        ("llama", {"tp_size": 2, "ep_size": 2}),
        ("soft", {"fsdp_size": 2}),
        nightly("qwen3_moe", EXPERTS),
        nightly("qwen3", EXPERTS),
        nightly("biases", EXPERTS),
        nightly("mixtral", {"tp_size": 2, "ep_size": 2}),
    ],
)
def test_two_ranks_have_the_gradients_of_one_process(ranks, name, sizes):
    for loss, gradient, where in ranks(2, equal.difference, name, sizes):
        assert loss < 1e-6
        assert gradient < 1e-5, where


FOUR = [
    {"fsdp_size": 4, "ep_size": 2},
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("llama", FOUR[2]), *[nightly(n, s) for n in ("llama", "mixtral", "qwen3_moe", "deepseek_v3") for s in FOUR]],
)
def test_four_ranks_have_the_gradients_of_one_process(ranks, name, sizes):
    for loss, gradient, where in ranks(4, equal.difference, name, sizes):
        assert loss < 1e-6
        assert gradient < 1e-5, where


UNEVEN = {"flex_olmo", "llama_moe_v2", "mocle"}  # 7, 7 and 5 experts
APART = {"arrow": "reads the weights of all experts", "longcat": "different kinds", "moepp": "different kinds"}


@pytest.mark.nightly
@pytest.mark.parametrize("name", catalogue())
def test_every_recipe_is_equal_on_two_ranks_or_refused_with_the_reason(ranks, name):
    if name in UNEVEN | APART.keys():
        for kind, text in ranks(2, equal.refused, name, EXPERTS):
            assert kind == "CannotBeParallel"
            assert APART.get(name, "cannot share evenly") in text
        if name == "mocle":  # looks up an input that these have not
            return
        sizes = {"fsdp_size": 2}
    else:
        sizes = EXPERTS
    for loss, gradient, where in ranks(2, equal.difference, name, sizes):
        assert loss < 1e-6
        assert gradient < 1e-5, where


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_padding_is_not_sent(ranks, name):
    for sent, tokens in ranks(2, equal.rows_sent, name):
        assert sent == [2 * tokens] * 2  # K rows per token, in each of two layers


@pytest.mark.parametrize(("name", "limit"), [("llama", 6), ("mixtral", 6), ("llama", None)])
def test_a_rank_never_computes_more_rows_than_its_limit_and_gradients_stay(ranks, name, limit):
    found = ranks(2, equal.most_rows, name, EXPERTS, limit)
    for loss, gradient, _ in found:
        assert loss < 1e-6
        assert gradient < 1e-5
    most = max(rows for *_, rows in found)
    assert most > 20 if limit is None else most <= limit


def test_experts_of_different_kinds_are_refused_with_a_way_out(ranks):
    for kind, text in ranks(2, equal.refused, "moepp", EXPERTS):
        assert kind == "CannotBeParallel"
        assert "they are of different kinds (FFN, Constant, Identity, Zero)" in text
        assert "leave ep_size=1" in text


def test_experts_that_ranks_cannot_share_evenly_are_refused():
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)
    with pytest.raises(CannotBeParallel, match=r"model.layers.0.mlp has 4 experts, which 3 processes cannot share"):
        expert_plan(model, 3)


def test_ranks_with_different_weights_are_refused(ranks):
    first, second = ranks(2, equal.other_weights)
    assert "lm_head.weight is not the same on all of them" in first
    assert first == second


def test_an_expert_parameter_that_the_plan_forgot_is_named(ranks):
    for text in ranks(2, equal.forgotten):
        assert "down_proj of the experts of model.layers.0.mlp lies whole on every process" in text


def test_a_placed_layer_knows_the_number_of_all_experts(ranks):
    assert ranks(2, equal.sizes_kept) == [(4, (4, 32, 64), (2, 32, 64))] * 2
