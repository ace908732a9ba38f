"""`SparseTrainer` on a model that transformers' engine shards: equal to one process, and it stops together."""

from functools import cache

import pytest

from distributed import trained
from distributed.pool import RankFailed
from nights import nightly

FSDP, EXPERTS = {"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}
FOUR = [{"fsdp_size": 4}, {"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 4, "ep_size": 4}]
REPLICAS = {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}


@pytest.fixture(scope="module")
def one(ranks, tmp_path_factory):
    """What a training of one process gives, by model and by whether only the balance has a gradient."""
    ranks.preload("moeify.parallel", "moeify.train", "transformers.models.llama.modeling_llama")
    folder = tmp_path_factory.mktemp("one")
    return cache(lambda name, alone: ranks(1, trained.run, folder / f"{name}{alone}", name, {}, 1, alone)[0])


@pytest.mark.parametrize(
    ("name", "sizes", "accumulation"),
    [
        ("llama", FSDP, 1),
        ("llama", EXPERTS, 2),
        *[nightly("llama", {}, n) for n in (2, 4, 8)],
        *[nightly(m, s, n) for m in ("llama", "mixtral", "deepseek_v3") for s in (FSDP, EXPERTS) for n in (1, 2, 4, 8)],
        *[nightly(m, s, n) for m in ("llama", "mixtral") for s in [*FOUR, REPLICAS] for n in (1, 8)],
    ],
)
def test_losses_metrics_gradients_and_weights_are_those_of_one_process(ranks, one, tmp_path, name, sizes, accumulation):
    count = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    for parts in ranks(count, trained.compared, tmp_path, name, sizes, accumulation, False, one(name, False)):
        for where, off in parts:
            assert off < 1e-5, where


@pytest.mark.parametrize(
    ("name", "sizes", "accumulation"),
    [
        ("mixtral", EXPERTS, 2),
        *[nightly(m, s, n) for m in ("llama", "mixtral") for s in (FSDP, EXPERTS, *FOUR) for n in (1, 2, 4, 8)],
    ],
)
def test_the_balance_gradient_is_that_of_one_process(ranks, one, tmp_path, name, sizes, accumulation):
    wanted = one(name, True)
    router = next(gradient for key, gradient in wanted[1][1].items() if "router" in key or "gate.weight" in key)
    assert router.norm() > 1e-3
    for parts in ranks(sizes["fsdp_size"], trained.compared, tmp_path, name, sizes, accumulation, True, wanted):
        for where, off in parts:
            assert off < 1e-4, where


@pytest.mark.parametrize(
    ("name", "sizes", "kind"),
    [
        ("llama", EXPERTS, "activation"),
        *[nightly(m, s, k) for m in ("llama", "mixtral") for s in (FSDP, EXPERTS) for k in ("activation", "gradient")],
    ],
)
def test_a_nan_on_one_rank_stops_all_before_the_same_step(ranks, one, tmp_path, name, sizes, kind):
    (other, untouched), (struck, also) = ranks(2, trained.struck, tmp_path, name, sizes, kind)
    assert untouched
    assert also
    if kind == "activation":
        assert other.startswith("a value of another process, which names it, is not finite in step 3")
        assert struck.startswith("the output of model.layers.0.self_attn is not finite in step 3")
    else:
        assert other.startswith("the gradient of ")
        assert other == struck
        assert "is not finite in step 3" in other


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [FSDP, EXPERTS])
def test_a_stopped_rank_is_an_error_within_the_timeout_that_was_asked_for(ranks, one, tmp_path, sizes):
    with pytest.raises(RankFailed, match=r"rank 0 of 2: RuntimeError: RuntimeError after ([3-9]|1\d)\.\d seconds"):
        ranks(2, trained.waited, tmp_path, "llama", sizes, 3)
