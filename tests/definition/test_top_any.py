"""DynMoE by a slow loop: top-any gating, its loss, and experts that are added and removed while training."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from moeify import Context, MoE, Recipe, load, save, sparsify
from moeify.experts import FFN
from moeify.layers import moe_layers
from moeify.losses import diversity_and_simplicity
from moeify.routers import TopAny
from moeify.sparsify import fresh
from moeify.train import AdaptExperts, SparseArguments, SparseTrainer
from moeify.train.adapt_experts import adapt
from strategies import route
from tiny_models import causal_lm


class Step(torch.autograd.Function):
    """The sign of what is positive, with the gradient of the identity, as the authors pass it."""

    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def by_loop(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    router, outputs = moe.router, []
    scale = router.log_scale.clamp(max=math.log(100)).exp()
    for token in x:
        scores = []
        for e in range(router.num_experts):
            cosine = token @ router.weight[e] / (token.norm() * router.weight[e].norm())
            scores.append(torch.sigmoid(cosine * scale)[0] * router.in_use[e])
        gates = [
            Step.apply(torch.relu(s - torch.sigmoid(g * scale)[0]))
            for s, g in zip(scores, router.threshold, strict=True)
        ]
        used = [e for e, gate in enumerate(gates) if gate > 0]
        if not used and not router.training:
            best = max(range(len(scores)), key=lambda e: scores[e].item())
            gates[best], used = torch.ones(()), [best]
        answers = moe.experts.all_outputs(token.unsqueeze(0))[0]
        total = sum((gates[e] * answers[e] for e in used), torch.zeros_like(token))
        outputs.append(total / max(1, len(used)))
    return torch.stack(outputs)


@pytest.mark.parametrize("training", [True, False])
def test_top_any_is_the_authors_gate_gradients_included(training):
    moe = MoE(TopAny(6, 5, start=4, temperature=0.5), FFN(5, 6, 8)).double().train(training)
    nn.init.normal_(moe.router.threshold, std=0.3)
    x = torch.randn(40, 6, dtype=torch.float64)
    numbers = moe.router(x, Context()).reads().sum(-1)
    assert len(numbers.unique()) > 2
    assert (numbers.min() == 0) == training
    parameters = [moe.router.weight, moe.router.threshold, moe.router.log_scale, *moe.experts.parameters()]
    target = torch.randn_like(x)
    ours, theirs = moe(x), by_loop(moe, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad((ours * target).sum(), parameters),
        torch.autograd.grad((theirs * target).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_distance_from_orthogonal_rows_and_their_mean_length():
    router = TopAny(6, 5, start=3)
    nn.init.normal_(router.weight)
    rows = router.weight[:3]
    expected = sum(row.norm() for row in rows) / 3
    squares = 0.0
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            squares = squares + (a @ b / (a.norm() * b.norm()) - float(i == j)) ** 2
    torch.testing.assert_close(diversity_and_simplicity(route(router, torch.randn(4, 6))), expected + squares.sqrt())


def test_unused_experts_go_and_one_comes_for_the_tokens_that_found_none():
    router = TopAny(6, 4, start=3)
    nn.init.constant_(router.threshold, 1.0)
    unserved = torch.randn(6)
    adapt(router, torch.tensor([5, 0, 2, 0]), unserved)
    assert router.in_use.tolist() == [1, 1, 1, 0]  # the place of the removed one is free again
    torch.testing.assert_close(router.weight[1], unserved / unserved.norm())
    assert router.threshold.tolist() == [1, 0, 1, 1]
    adapt(router, torch.tensor([1, 1, 0, 0]), torch.zeros(6))
    assert router.in_use.tolist() == [1, 1, 0, 0]
    adapt(router, torch.zeros(4), torch.zeros(6))
    assert router.in_use.tolist() == [1, 1, 0, 0]  # a layer keeps an expert


def test_what_tokens_without_an_expert_have_in_common_is_in_the_evidence():
    router = TopAny(6, 4)
    nn.init.constant_(router.threshold, 0.2)
    x = torch.randn(30, 6)
    decision = router.train()(x, Context())
    none = ~decision.reads().any(-1)
    assert 0 < none.sum() < 30
    torch.testing.assert_close(decision.evidence.unserved, x[none].sum(0))


def test_a_model_trains_with_experts_that_adapt_and_keeps_them(tmp_path):
    model = causal_lm("llama", num_hidden_layers=1)
    sparsify(model, Recipe(num_experts=4, router=partial(TopAny, start=2), experts=fresh), verbose=False)
    router = next(iter(moe_layers(model).values())).router
    nn.init.constant_(router.threshold, 5.0)  # no token passes
    data = [{"input_ids": (ids := torch.randint(5, 60, (8,))), "labels": ids} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, report_to=[],
        save_strategy="no", use_cpu=True, learning_rate=1e-6,
    )  # fmt: skip
    sparse = SparseArguments(balance=0, losses=[(1e-2, diversity_and_simplicity)], progress=False)
    trainer = SparseTrainer(
        model=model, args=arguments, train_dataset=data, sparse=sparse, callbacks=[AdaptExperts(every=3, window=2)]
    )
    trainer.train()
    assert router.in_use.tolist() == [1, 1, 1, 0]
    assert router.threshold[2].item() == pytest.approx(0, abs=1e-4)
    ids = data[0]["input_ids"].unsqueeze(0)
    expected = model.eval()(input_ids=ids).logits
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(next(iter(moe_layers(again).values())).router.in_use, router.in_use)
    assert torch.equal(again(input_ids=ids).logits, expected)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="start=5 experts in use out of 4"):
        TopAny(6, 4, start=5)
    with pytest.raises(ValueError, match="below the least"):
        TopAny(6, 4, temperature=0.001)
    with pytest.raises(ValueError, match="window=5 steps of every=3"):
        AdaptExperts(every=3, window=5)
    with pytest.raises(ValueError, match="has no TopAny"):
        AdaptExperts().on_train_begin(None, None, None, model=causal_lm("llama"))
