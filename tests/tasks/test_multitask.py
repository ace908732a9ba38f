"""Tables are learned by MMoE, CGC and PLE: as DeepCTR-Torch computes them, at the cost of their shared bottom."""

from __future__ import annotations

import csv
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import load, save, sparsify
from moeify.flops import count
from moeify.models import MultiTask
from moeify.tasks.base import Shape
from moeify.tasks.multitask import METHODS, ManyTasks, auc

SIZES, NUMBERS, TASKS = [5, 3], 4, 2


def model(method, experts=4, levels=1):
    torch.manual_seed(0)
    dense = MultiTask(SIZES, NUMBERS, TASKS, embedding=4, hidden=12, out=6, levels=levels, tower=5)
    probe = {"categories": torch.zeros(2, 2, dtype=torch.int64), "numbers": torch.randn(2, NUMBERS)}
    return sparsify(dense, METHODS[method](experts, TASKS, 1), probe=probe, verbose=False)


def batch(rows=7):
    torch.manual_seed(1)
    categories = torch.stack([torch.randint(size, (rows,)) for size in SIZES], 1)
    return {"categories": categories, "numbers": torch.randn(rows, NUMBERS), "labels": torch.rand(rows, TASKS).round()}


def as_deepctr(ours, experts, levels, inputs):
    """The model of DeepCTR-Torch with our weights, pairs of parameters, its gates and inputs.

    Its PLE has as many shared experts as each task has.
    """
    deepctr = pytest.importorskip("deepctr_torch.models.multitask")
    features = pytest.importorskip("deepctr_torch.inputs")
    columns = [features.SparseFeat(f"c{i}", size, embedding_dim=4) for i, size in enumerate(SIZES)]
    columns += [features.DenseFeat(f"x{i}", 1) for i in range(NUMBERS)]
    common = {
        "expert_dnn_hidden_units": (12 // experts, 6), "gate_dnn_hidden_units": (), "tower_dnn_hidden_units": (5,),
        "task_types": ("binary",) * TASKS, "task_names": ("a", "b"),
    }  # fmt: skip
    if levels == 0:
        theirs = deepctr.MMOE(columns, num_experts=experts, **common)
        by_level = [theirs.expert_dnn]
        gates = [[theirs.gate_dnn_final_layer, None]]
    else:
        theirs = deepctr.PLE(
            columns, shared_expert_num=1, specific_expert_num=1, num_levels=levels, **common
        )  # fmt: skip
        by_level = [
            [e for own in theirs.specific_experts[i] for e in own] + list(theirs.shared_experts[i][0])
            for i in range(levels)
        ]
        gates = [
            [theirs.specific_gate_dnn_final_layer[i], theirs.shared_gate_dnn_final_layer[i] if i < levels - 1 else None]
            for i in range(levels)
        ]
    pairs = [(ours.embeddings[i].weight, theirs.embedding_dict[f"c{i}"].weight) for i in range(len(SIZES))]
    for level, their_experts in zip(ours.levels, by_level, strict=True):
        own = getattr(level.experts, "experts", level.experts)
        own = getattr(own, "experts", own)
        for mine, their in zip(own, their_experts, strict=True):
            for part, linear in zip((mine[0], mine[2]), their.linears, strict=True):
                pairs += [(part.weight, linear.weight), (part.bias, linear.bias)]
    for mine, their, last, out in zip(
        ours.towers, theirs.tower_dnn, theirs.tower_dnn_final_layer, theirs.out, strict=True
    ):
        pairs += [(mine[0].weight, their.linears[0].weight), (mine[0].bias, their.linears[0].bias)]
        pairs += [(mine[2].weight, last.weight), (mine[2].bias, out.bias)]
    with torch.no_grad():
        for mine, their in pairs:
            their.copy_(mine)
        seen = [level.router.sees for level in ours.levels]
        for level, (own, shared), sees in zip(ours.levels, gates, seen, strict=True):
            for task, gate in enumerate(own):
                gate.weight.copy_(level.router.weight[task][sees[task]])
            if shared is not None:
                gate = shared if hasattr(shared, "weight") else shared[0]
                gate.weight.copy_(level.router.weight[-1])
    x = torch.cat([inputs["categories"].float(), inputs["numbers"]], 1)
    return theirs, pairs, gates, x


@pytest.mark.parametrize(("method", "experts", "levels"), [("mmoe", 4, 0), ("ple", 3, 1), ("ple", 3, 2), ("cgc", 3, 1)])
def test_outputs_and_gradients_are_those_of_deepctr(method, experts, levels):
    pytest.importorskip("deepctr_torch")
    ours, inputs = model(method, experts, levels=max(1, levels)), batch()
    theirs, pairs, gates, x = as_deepctr(ours, experts, levels, inputs)
    expected = theirs(x)
    found = ours(**inputs)
    torch.testing.assert_close(found.logits.sigmoid(), expected, atol=1e-6, rtol=0)
    found.loss.backward()
    torch.nn.functional.binary_cross_entropy(expected, inputs["labels"]).backward()
    for mine, their in pairs:
        torch.testing.assert_close(mine.grad, their.grad, atol=1e-6, rtol=0)
    for level, (own, _) in zip(ours.levels, gates, strict=True):
        for task, gate in enumerate(own):
            grad = level.router.weight.grad[task][level.router.sees[task]]
            torch.testing.assert_close(grad, gate.weight.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("method", "levels"), [("mmoe", 1), ("cgc", 1), ("ple", 2)])
def test_experts_cost_what_the_shared_bottom_costs_and_gates_little(method, levels):
    dense = MultiTask(SIZES, NUMBERS, TASKS, embedding=4, hidden=12, out=6, levels=levels, tower=5)
    sparse = model(method, levels=levels)
    gates = sum(2 * level.router.weight.numel() for level in sparse.levels)
    assert count(sparse).flops == count(dense).flops + gates


@pytest.mark.parametrize(("method", "levels"), [("mmoe", 1), ("ple", 2)])
def test_what_is_saved_is_loaded_by_name(method, levels, tmp_path):
    saved, inputs = model(method, levels=levels), batch()
    save(saved, tmp_path)
    assert torch.equal(load(tmp_path)(**inputs).logits, saved.eval()(**inputs).logits)


def test_a_missing_label_adds_nothing():
    ours, inputs = model("mmoe"), batch()
    inputs["labels"][0, 1] = torch.nan
    changed = {**inputs, "labels": inputs["labels"].clone()}
    loss = ours(**inputs).loss
    others = ours(**{**changed, "labels": changed["labels"][1:], "categories": inputs["categories"][1:],
                     "numbers": inputs["numbers"][1:]}).loss  # fmt: skip
    first = ours(**{name: value[:1] for name, value in inputs.items()}).loss
    torch.testing.assert_close(loss * 13, others * 12 + first)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2))
def test_auc_is_the_chance_that_a_positive_has_the_higher_score(pairs):
    positive, negative = ([score for score, label in pairs if label is kind] for kind in (True, False))
    found = auc(torch.tensor([float(s) for s, _ in pairs]), torch.tensor([float(label) for _, label in pairs]))
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert found == pytest.approx(sum(wins) / len(wins) if wins else 0.5)


def test_a_table_is_read_with_a_column_per_task(tmp_path):
    rows = [OrderedDict(age=20 + i, job="ab"[i % 2], paid="yn"[i % 3 == 0], city=str(i % 4) + "x") for i in range(60)]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    task = ManyTasks(shape=Shape(width=16, hidden=32), columns="paid, city=1x", leave_out="job")
    setup = task.prepare(None, str(tmp_path / "train.csv"))
    assert setup.facts["tasks"].startswith("paid=n (3")
    assert setup.facts["inputs"] == "1 columns of numbers, 0 of categories"
    assert task.recipe(4).num_experts == 4
    with pytest.raises(ValueError, match="did you mean 'mmoe'"):
        ManyTasks(method="mmo").recipe(4)
    with pytest.raises(ValueError, match="takes no --model"):
        task.prepare("bert", None)
    with pytest.raises(ValueError, match="no column is named to predict; name one per task, of: age"):
        ManyTasks().prepare(None, str(tmp_path / "train.csv"))
