"""Several tasks share experts: a gate per task (MMoE), experts of their own (CGC), levels of these (PLE), a few of all.

The data is synthetic: two regressions on the same features, whose weights have correlation 0.5 (MMoE, section 3).
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from moeify import MoE, record
from moeify.experts import FFN, Plain
from moeify.ple import ple
from moeify.routers import MultiGate, SparseMultiGate

FEATURES, EXPERTS, TASKS = 100, 8, 2


def two_tasks(rows, correlation, scale=0.3):
    """Features (T, 100) and what each task asks of them, (T, 2)."""
    u1, u2 = torch.linalg.qr(torch.randn(FEATURES, 2)).Q.T
    w = scale * torch.stack([u1, correlation * u1 + (1 - correlation**2) ** 0.5 * u2])
    alpha, beta = torch.randn(2, 5, 1, 1)
    x = torch.randn(rows, FEATURES)
    linear = x @ w.T
    y = linear + torch.sin(alpha * linear + beta).sum(0) + 0.1 * torch.randn(rows, TASKS)
    return x, (y - y.mean(0)) / y.std(0)


class MultiTask(nn.Module):
    """Features of every task from experts that tasks share, and a tower of its own for each."""

    def __init__(self, extract: nn.Module) -> None:
        super().__init__()
        self.extract = extract
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(TASKS))

    def forward(self, x):
        answers = self.extract(x).unbind(1)  # one per task
        return torch.cat([tower(answer) for tower, answer in zip(self.towers, answers, strict=True)], dim=1)


torch.manual_seed(1)
x, y = two_tasks(2000, correlation=0.5)
experts = partial(FFN, hidden=16, activation=Plain(F.relu), bias=True, width_out=16)
extractions = {
    "MMoE": MoE(MultiGate(FEATURES, EXPERTS, gates=TASKS), experts(EXPERTS, FEATURES)),
    "CGC": MoE(MultiGate(FEATURES, EXPERTS, gates=TASKS, private=2), experts(EXPERTS, FEATURES)),
    "PLE": ple(FEATURES, 16, experts, tasks=TASKS, levels=2, private=2, shared=4),
    "sparse": MoE(SparseMultiGate(FEATURES, EXPERTS, gates=TASKS, k=2, union=3), experts(EXPERTS, FEATURES)),
}
print("synthetic data; a model that answers the mean has a loss of 1")
for name, extract in extractions.items():
    model = MultiTask(extract)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(5):
        for rows in torch.randperm(len(x)).split(100):
            loss = F.mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    first, last = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
    assert last < 0.3
    with record(model) as decisions:
        model(x)
    asked = sum(d.source.bincount().float().mean() for d in decisions.values()) / len(decisions)
    print(f"{name:6}  loss {first:.3f} -> {last:.3f}, {asked:.1f} of {EXPERTS} experts per row and level")
