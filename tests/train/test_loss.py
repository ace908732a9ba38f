"""The balance loss of a step does not depend on how the step is cut into micro-batches, nor on padding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainingArguments

from moeify.losses import importance
from moeify.routing import Evidence, assign
from moeify.sparsify import Recipe, sparsify
from moeify.train import SparseArguments, SparseTrainerMixin
from moeify.train.loss import StepLoss, count_decisions
from tiny_models import VOCABULARY, causal_lm, mixtral


class Silent(transformers.Trainer):
    """Has no loss of its own, so that what remains is the balance."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (0 * loss, outputs) if return_outputs else 0 * loss


class Balanced(SparseTrainerMixin, Silent):
    pass


class Full(SparseTrainerMixin, transformers.Trainer):
    pass


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def llama():
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)


MODELS = {"sparse llama": llama, "hf mixtral": mixtral}


def sequences(padding=0, rows=16, length=12, seed=0):
    """Sequences of 5 to 12 tokens, padded to their longest and `padding` more."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, length + 1, (rows,), generator=generator).tolist()
    data = []
    for n in lengths:
        ids = torch.randint(3, VOCABULARY, (n,), generator=generator)
        pad = torch.zeros(length - n + padding, dtype=torch.long)
        mask = torch.cat([torch.ones(n, dtype=torch.long), pad])
        data.append({
            "input_ids": torch.cat([ids, pad]), "attention_mask": mask, "labels": torch.cat([ids, pad - 100])
        })  # fmt: skip
    return data


def router_gradients(tmp_path, build, sparse, *, steps, padding=0, kind=Balanced, rows=8):
    """The routers' gradients of two optimizer steps of 8 rows each, cut into `steps` micro-batches."""
    model, seen = build(), Gradients()
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=rows // steps, gradient_accumulation_steps=steps,
        learning_rate=0.0, max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    kind(model, arguments, train_dataset=sequences(padding), callbacks=[seen], sparse=sparse).train()
    assert len(seen.steps) == 2
    return [{n: g for n, g in step.items() if "router" in n or "gate.weight" in n} for step in seen.steps]


def same(one, other, tolerance=2e-5):
    return all((one[n] - other[n]).norm() <= tolerance * one[n].norm() for n in one) and one.keys() == other.keys()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_the_balance_gradient_is_the_same_however_the_step_is_cut_and_padded(tmp_path, build, scope):
    sparse = SparseArguments(balance=1.0, z=0.1, scope=scope)
    whole = router_gradients(tmp_path, build, sparse, steps=1)
    assert whole[1]
    assert all(gradient.norm() > 1e-4 for gradient in whole[1].values())
    for steps, padding in [(2, 0), (8, 0), (1, 7), (8, 7)]:
        cut = router_gradients(tmp_path, build, sparse, steps=steps, padding=padding)
        assert all(same(a, b) for a, b in zip(whole, cut, strict=True)), (steps, padding)


def test_the_batch_scope_depends_on_the_cut_as_its_documentation_says(tmp_path):
    sparse = SparseArguments(balance=1.0, scope="batch")
    whole, cut = (router_gradients(tmp_path, llama, sparse, steps=steps) for steps in (1, 8))
    assert not same(whole[1], cut[1], 1e-2)


def test_the_balance_gradient_adds_to_the_gradient_of_the_task_and_leaves_it_alone(tmp_path):
    parts = {
        steps: [
            router_gradients(tmp_path, llama, SparseArguments(balance=weight), steps=steps, kind=kind)[1]
            for weight, kind in [(0.0, Full), (1.0, Balanced), (1.0, Full)]
        ]
        for steps in (1, 4)
    }
    for task, balance, both in parts.values():
        assert same({name: task[name] + balance[name] for name in task}, both)
    assert same(parts[1][2], parts[4][2])


def test_a_trainer_whose_loss_is_a_mean_per_batch_is_not_divided_twice(tmp_path):
    class Mean(transformers.Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (0 * outputs.loss, outputs) if return_outputs else 0 * outputs.loss

    class SparseMean(SparseTrainerMixin, Mean):
        pass

    sparse = SparseArguments(balance=1.0)
    whole, cut = (router_gradients(tmp_path, llama, sparse, steps=steps, kind=SparseMean) for steps in (1, 4))
    assert same(whole[1], cut[1])
    assert same(whole[1], router_gradients(tmp_path, llama, sparse, steps=4)[1])


def images(count, patches, seed=0):
    """A step of images: every patch is a decision, and no input tells how many patches there are."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, patches, 4, generator=generator, requires_grad=True)
    return {"pixel_values": torch.zeros(count, 3, 2, 2)}, logits


def texts(count, length, seed=0):
    """A step of padded texts: every real token is a decision."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (count, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    logits = torch.randn(count, length, 4, generator=generator, requires_grad=True)
    return {"input_ids": mask, "attention_mask": mask}, logits


def decide(batch, logits):
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(logits.shape[:2]).bool()
    group = torch.arange(len(real)).unsqueeze(1).expand_as(real)[real]
    scores = logits[real].softmax(-1)
    index = scores.topk(2).indices
    gates = scores.gather(-1, index)
    return assign(index, gates, 4, evidence=Evidence(logits=logits[real], scores=scores, sequence_id=group))


@given(
    make=st.sampled_from([images, texts]),
    rows=st.integers(2, 9),
    width=st.integers(1, 6),
    cut=st.integers(1, 8),
    scope=st.sampled_from(["global", "sequence"]),
)
def test_the_parts_of_a_step_add_up_to_the_step(make, rows, width, cut, scope):
    batch, logits = make(rows, width)
    found = []
    for edges in ([0, rows], [0, min(cut, rows - 1), rows]):
        parts = [({name: t[a:b] for name, t in batch.items()}, logits[a:b]) for a, b in pairwise(edges)]
        step = StepLoss(scope, assigned={"layer": torch.tensor([9.0, 1.0, 1.0, 5.0])})
        step.begin([inputs for inputs, _ in parts])
        loss = torch.zeros(())
        for inputs, part in parts:
            decisions = [("layer", decide(inputs, part))]
            loss = loss + step.balance(decisions, count_decisions(inputs)) + step.z(decisions, count_decisions(inputs))
            step.add(decisions)
        step.end()
        found.append((loss, torch.autograd.grad(loss, logits)[0], step.assigned["layer"]))
    for whole, cut_up in zip(*found, strict=True):
        assert torch.allclose(whole, cut_up, rtol=1e-5, atol=1e-6)


def test_every_layer_counts_alike_and_perfect_balance_is_one():
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5)}
    assert count_decisions(batch) == {
        "attention_mask": 10,
        "decoder_attention_mask": 0,
        "input_ids": 10,
        "labels": 0,
        "rows": 2,
    }
    assert count_decisions({"pixel_values": torch.zeros(3, 3, 8, 8), "labels": torch.zeros(3)})["rows"] == 3


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(weight):
    three = {"balance": {"balance": weight}, "z": {"z": weight}, "importance": {"losses": [(weight, importance)]}}
    for name, options in three.items():
        with pytest.raises(ValueError, match=f"{name}={weight} is no weight of a loss"):
            SparseArguments(**options)


def test_negative_weights_and_unknown_scopes_are_refused():
    with pytest.raises(ValueError, match="reward imbalance"):
        SparseArguments(balance=-1.0)
    with pytest.raises(ValueError, match="choose from global, batch, sequence"):
        SparseArguments(scope="rank")
