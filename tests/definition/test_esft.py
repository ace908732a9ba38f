"""ESFT's relevance scores and its choice of experts (arXiv 2407.01906), as loops over tokens and experts."""

from __future__ import annotations

import pytest
import torch

from moeify import MoE
from moeify.experts import FFN
from moeify.routers import Soft, TopK, TopP
from moeify.train import average_gate, expert_relevance, selection_ratio
from moeify.train.relevance import Relevance

T, D, E, K = 40, 8, 6, 2


def scored(router, x):
    """Both scores by the paper: averages over tokens of the gate, and of 1 / K where it is not zero."""
    layer = MoE(router, FFN(E, D, 4)).double()
    gates, ratios = torch.zeros(E).double(), torch.zeros(E).double()
    table = layer.router(x, layer.context).weight_table()
    for token in table.double():
        chosen = token.nonzero().flatten()
        for expert in chosen:
            gates[expert] += token[expert] / len(x)
            ratios[expert] += 1 / len(chosen) / len(x)
    return layer, gates, ratios


@pytest.mark.parametrize("router", [TopK(D, E, k=K), TopK(D, E, k=K, normalize=False, scale=2.5), TopP(D, E, p=0.5)])
def test_scores_are_means_over_all_tokens_of_gates_and_of_choices(router):
    torch.manual_seed(0)
    x = torch.randn(T, D).double()
    layer, gates, ratios = scored(router, x)
    halves = [x[: T // 4], x[T // 4 :]]
    assert torch.allclose(expert_relevance(layer, halves, average_gate).layers[""], gates, atol=1e-6)
    found = expert_relevance(layer, halves, selection_ratio).layers[""]
    assert torch.allclose(found, ratios, atol=1e-12)
    assert found.sum().item() == pytest.approx(1)


def chosen_by_the_paper(scores, threshold):
    """The smallest set whose scores reach the threshold, the best first."""
    chosen, total = [], 0.0
    for expert, score in sorted(enumerate(scores.tolist()), key=lambda pair: pair[1], reverse=True):
        if total >= threshold:
            break
        chosen.append(expert)
        total += score
    return chosen


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.2, 0.5, 0.9, 1.0])
def test_experts_are_chosen_until_their_scores_reach_the_threshold(threshold):
    scores = torch.rand(64, generator=torch.Generator().manual_seed(1)).double()
    scores[7] = scores[3]  # ties go to the first
    for each in (scores / scores.sum(), 0.4 * scores / scores.sum()):
        assert Relevance({"layer": each}).choose(threshold)["layer"] == chosen_by_the_paper(each, threshold)


def test_what_cannot_be_scored_is_refused():
    layer = MoE(TopK(D, E), FFN(E, D, 4))
    with pytest.raises(ValueError, match="no token was routed"):
        expert_relevance(layer, [])
    with pytest.raises(ValueError, match="mixes all tokens"):
        expert_relevance(MoE(Soft(D, E), FFN(E, D, 4)), [torch.randn(2, 8, D)])
    with pytest.raises(ValueError, match="choose 0 < threshold <= 1"):
        expert_relevance(layer, [torch.randn(4, D)]).choose(20)
