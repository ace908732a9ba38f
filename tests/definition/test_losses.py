"""Balance losses against their sums, written out."""

from dataclasses import replace
from math import exp, log

import pytest
import torch

from moeify import assign, losses
from moeify.routers import Capacity, ExpertGroups, NoisyTopK, ReLU, TopK, sigmoid
from strategies import agree, route, sharpen

B, N, D, E, K = 3, 4, 5, 6, 2


def decision(**options):
    router = TopK(D, E, k=K, **options)
    sharpen(router)
    return route(router, torch.randn(B, N, D))


def slow_probability(scores):
    return [[s_j / sum(s) for s_j in s] for s in scores]


def slow_balance(index, p, assigned=None):
    tokens = len(p)
    total = 0.0
    for j in range(E):
        share = sum(float(j in row) for row in index.tolist()) / (K * tokens)
        f = share if assigned is None else float(assigned[j] / assigned.sum())
        total = total + f * sum(p_t[j] for p_t in p) / tokens
    return E * total


def with_scores(routing, scores):
    return replace(routing, evidence=replace(routing.evidence, scores=scores))


def scores_of(routing):
    """The decision with scores that are leaves, in fp32, and the same in fp64."""
    leaf = routing.scores.detach().requires_grad_()
    return with_scores(routing, leaf), leaf, leaf.detach().double().requires_grad_()


@pytest.mark.parametrize("options", [{}, {"score": sigmoid}])
def test_balance_over_the_batch_is_switch_equations_4_to_6(options):
    routing, leaf, leaf64 = scores_of(decision(**options))
    slow = slow_balance(routing.choices.indices, slow_probability(leaf64))
    agree(losses.balance(routing), [leaf], slow, [leaf64])


def test_balance_may_take_its_load_from_a_whole_step():
    routing, leaf, leaf64 = scores_of(decision())
    assigned = torch.arange(1.0, E + 1)
    slow = slow_balance(routing.choices.indices, slow_probability(leaf64), assigned)
    agree(losses.balance(routing, assigned=assigned), [leaf], slow, [leaf64])


def test_balance_by_sequence_is_each_sequences_own_averaged():
    routing, leaf, leaf64 = scores_of(decision(score=sigmoid))
    p = slow_probability(leaf64)
    slow = sum(slow_balance(routing.choices.indices[b * N : (b + 1) * N], p[b * N : (b + 1) * N]) for b in range(B)) / B
    agree(losses.balance(routing, "sequence"), [leaf], slow, [leaf64])


def test_sequence_balance_is_deepseek_v3s_equations_17_to_20():
    groups = ExpertGroups(3, 2, "top2")
    routing, leaf, leaf64 = scores_of(decision(score=sigmoid, selection_bias=True, expert_groups=groups))
    p = slow_probability(leaf64)
    largest = torch.tensor([sorted(range(E), key=lambda j, t=t: -leaf64[t, j].item())[:K] for t in range(B * N)])
    assert not torch.equal(largest.sort(-1).values, routing.choices.indices.sort(-1).values)
    slow = sum(slow_balance(largest[b * N : (b + 1) * N], p[b * N : (b + 1) * N]) for b in range(B)) / B
    agree(losses.sequence_balance(routing), [leaf], slow, [leaf64])


def test_importance_is_the_squared_variation_of_summed_weights():
    gates = torch.rand(4, K, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 0], [1, 5], [3, 4]])
    gates64 = gates.detach().double().requires_grad_()
    sums = [sum(gates64[t, c] for t in range(4) for c in range(K) if index[t, c] == j) for j in range(E)]
    mean = sum(sums) / E
    slow = sum((s - mean) ** 2 for s in sums) / E / mean**2
    agree(losses.importance(assign(index, gates, E)), [gates], slow, [gates64])


def test_score_importance_is_the_squared_variation_of_every_experts_summed_scores():
    router = NoisyTopK(D, E, k=2, noise="1/E", order="softmax")
    torch.nn.init.normal_(router.weight)
    routing = route(router, torch.randn(B, N, D))
    z64 = routing.logits.detach().double().requires_grad_()
    scores = [[torch.exp(z64[t, j]) / torch.exp(z64[t]).sum() for j in range(E)] for t in range(B * N)]
    sums = [sum(row[j] for row in scores) for j in range(E)]
    mean = sum(sums) / E
    slow = sum((s - mean) ** 2 for s in sums) / E / mean**2
    agree(losses.score_importance(routing), [routing.logits], slow, [z64])


def test_load_counts_the_rows_that_were_assigned_before_any_were_dropped():
    router = Capacity(TopK(D, 2, k=1, normalize=False), factor=0.1)
    torch.nn.init.zeros_(router.router.weight)
    routing = route(router, torch.ones(8, D))
    assert routing.counts.sum() < 8
    assert losses.load_loss(routing).item() == pytest.approx(1.0)  # counts 8 and 0: mean 4, deviation 4
    assert losses.share(routing).sum() == 1


def test_l1_is_remoes_equation_10():
    router = ReLU(D, E)
    sharpen(router)
    routing, leaf, leaf64 = scores_of(route(router, torch.randn(B, N, D)))
    tokens = B * N
    used = [sum(float(leaf64[t, j] > 0) for t in range(tokens)) for j in range(E)]
    slow = E * sum(used[j] / (tokens * K) * sum(leaf64[t, j] for t in range(tokens)) / tokens for j in range(E))
    agree(losses.l1(routing, K), [leaf], slow, [leaf64])


def test_z_is_the_mean_squared_logsumexp():
    routing = decision()
    slow = sum(log(sum(exp(z) for z in row)) ** 2 for row in routing.logits.tolist()) / (B * N)
    assert losses.z(routing).item() == pytest.approx(slow, rel=1e-5)


def test_balance_of_groups_is_mean_load_times_summed_probability_of_every_group():
    routing, leaf, leaf64 = scores_of(decision())
    p, groups = slow_probability(leaf64), [range(0, 3), range(3, 6)]
    tokens = B * N
    f = [sum(float(j in row) for row in routing.choices.indices.tolist()) * E / (K * tokens) for j in range(E)]
    slow = 0.0
    for group in groups:
        slow = slow + sum(f[j] for j in group) / len(group) * sum(p_t[j] for p_t in p for j in group) / tokens
    agree(losses.group_balance(routing, 2), [leaf], slow, [leaf64])


def test_groups_must_divide_the_experts():
    with pytest.raises(ValueError, match="cannot be divided into 4 groups"):
        losses.group_balance(decision(), 4)


def slow_entropy(p):
    return -sum(p_j * p_j.log() for p_j in p)


def test_local_entropy_is_the_mean_entropy_of_the_tokens_of_a_modality():
    routing, leaf, leaf64 = scores_of(decision())
    of = torch.arange(B * N) % 3 == 0
    p = [row for row, chosen in zip(slow_probability(leaf64), of, strict=True) if chosen]
    slow = sum(slow_entropy(row) for row in p) / len(p)
    agree(losses.local_entropy(routing, of), [leaf], slow, [leaf64])


@pytest.mark.parametrize("experts", [None, 5.5])
def test_global_entropy_is_what_the_mean_lacks_of_the_entropy_of_so_many_experts(experts):
    routing, leaf, leaf64 = scores_of(decision())
    of = torch.arange(B * N) % 3 == 0
    p = [row for row, chosen in zip(slow_probability(leaf64), of, strict=True) if chosen]
    slow = log(experts or E) - slow_entropy([sum(column) / len(p) for column in zip(*p, strict=True)])
    assert slow > 0
    agree(losses.global_entropy(routing, of, experts), [leaf], slow, [leaf64])
    assert losses.global_entropy(routing, of, experts=1.1) == 0


def test_a_modality_that_is_not_there_costs_nothing():
    routing, leaf, _ = scores_of(decision())
    none = torch.zeros(B * N, dtype=torch.bool)
    for loss in (losses.local_entropy, losses.global_entropy):
        value = loss(routing, none)
        value.backward()
        assert value == 0
    assert leaf.grad.count_nonzero() == 0


def test_an_expert_that_is_certain_has_no_entropy_and_a_finite_gradient():
    scores = torch.eye(E, requires_grad=True)
    routing = with_scores(decision(), scores)
    losses.local_entropy(routing).backward()
    assert losses.local_entropy(routing) == 0
    assert scores.grad.isfinite().all()


def test_orthogonality_is_the_mean_squared_cosine_of_different_rows():
    weight = torch.randn(E, D, requires_grad=True)
    w = weight.detach().double().requires_grad_()
    pairs = [(i, j) for i in range(E) for j in range(E) if i != j]
    slow = sum((w[i] @ w[j] / (w[i].norm() * w[j].norm())) ** 2 for i, j in pairs) / len(pairs)
    agree(losses.orthogonality(weight), [weight], slow, [w])
    assert losses.orthogonality(torch.eye(4)) == 0


def test_cosine_of_outputs_is_the_mean_over_shared_tokens():
    expert_outputs = torch.randn(7, 3, D, requires_grad=True)
    a = expert_outputs.detach().double().requires_grad_()
    slow = torch.stack(
        [
            torch.stack([sum(t[i] @ t[j] / (t[i].norm() * t[j].norm()) for t in a) / len(a) for j in range(3)])
            for i in range(3)
        ]
    )
    agree(losses.cosine(expert_outputs), [expert_outputs], slow, [a])


def test_linear_cka_is_its_ratio_of_frobenius_norms():
    expert_outputs = torch.randn(7, 3, D, requires_grad=True)
    a = expert_outputs.detach().double().requires_grad_()
    y = [a[:, i] - a[:, i].mean(0) for i in range(3)]
    norm = [[(y[i].T @ y[j]).square().sum() for j in range(3)] for i in range(3)]
    slow = torch.stack(
        [torch.stack([norm[i][j] / (norm[i][i] * norm[j][j]).sqrt() for j in range(3)]) for i in range(3)]
    )
    agree(losses.linear_cka(expert_outputs), [expert_outputs], slow, [a])


def test_linear_cka_does_not_see_rotations_scales_and_shifts():
    y = torch.randn(20, D)
    turned = 3 * y @ torch.linalg.qr(torch.randn(D, D)).Q + 1
    assert losses.linear_cka(torch.stack([y, turned], dim=1))[0, 1].item() == pytest.approx(1, abs=1e-5)


def test_similarity_is_the_mean_over_pairs_of_different_experts():
    assert losses.similarity(torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])) == 2
    assert losses.similarity(torch.tensor([[9.0]])) == 0
