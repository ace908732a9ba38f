"""Experts move between processes while a model trains, and it trains as if they had stayed."""

import pytest
import torch

from distributed import rebalanced
from nights import nightly


@pytest.mark.parametrize(
    ("size", "ep", "fsdp", "shadows"),
    [
        (2, 2, True, 0), (4, 2, True, 2), nightly(2, 2, True, 2), nightly(4, 2, True, 0), nightly(4, 4, True, 0),
        nightly(4, 4, True, 2), nightly(4, 2, False, 0), nightly(4, 2, False, 2),
    ],
)  # fmt: skip
def test_a_training_whose_experts_move_is_the_one_whose_experts_stay(ranks, size, ep, fsdp, shadows):
    for worst, ended, slots in ranks(size, rebalanced.beside_static, ep, fsdp, shadows):
        assert worst["outputs"] <= 1e-6
        assert max(worst.values()) <= 1e-5, worst
        assert max(ended.values()) <= 1e-6, ended
        assert all(place.tolist() != list(range(rebalanced.EXPERTS)) for place in slots)


@pytest.mark.parametrize(
    ("name", "shadows"), [("llama", 0), nightly("mixtral", 0), nightly("llama", 1), ("mixtral", 1)]
)
def test_the_trainer_moves_experts_and_trains_as_without_moving(ranks, tmp_path, name, shadows):
    sizes = {"fsdp_size": 2, "ep_size": 2}
    still, moved = (
        ranks(2, rebalanced.of_trainer, str(tmp_path / str(moves)), name, sizes, moves, shadows)[0]
        for moves in (None, "always")
    )
    assert moved[2] == rebalanced.STEPS // 2
    assert torch.tensor(moved[0]) == pytest.approx(torch.tensor(still[0]), abs=1e-5)
    assert not {key: d for key, weight in still[1].items() if (d := float((moved[1][key] - weight).abs().max())) > 1e-5}


@pytest.mark.parametrize("shadows", [0, 1])
def test_a_rebalancer_moves_experts_where_routing_is_lastingly_skewed(ranks, tmp_path, shadows):
    sizes = {"fsdp_size": 2, "ep_size": 2}
    *_, moves = ranks(2, rebalanced.of_trainer, str(tmp_path), "llama", sizes, "pays", shadows)[0]
    assert moves == 1


def test_checkpoints_hold_experts_in_their_order_wherever_they_lie(ranks, tmp_path):
    for before, after, other in ranks(2, rebalanced.through_a_checkpoint, str(tmp_path)):
        for name, tensor in before.items():
            limit = 1e-6 if name == "outputs" else 0
            assert (after[name] - tensor).abs().max() <= limit, name
            assert (other[name] - tensor).abs().max() <= limit, name


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("modules", "cannot change places: .* as where they are modules of their own"),
        ("whole", "call shard or distribute with ep above 1"),
        ("layers", "the placement has 3 layers, and the model divides 2"),
        ("experts", "is of 4 experts on 2 processes, and layers.0 has 8 on 2"),
        ("spare", "10 slots for 8 experts, .* use shadows, not replicas"),
        ("replicas", "spare=1 is for replicas .* make the Rebalancer with shadows=1"),
    ],
)
def test_what_cannot_move_is_refused(ranks, what, said):
    for found in ranks(2, rebalanced.refused, what):
        with pytest.raises(ValueError, match=said):
            raise ValueError(found)
