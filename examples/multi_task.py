"""Several tasks share experts: one gate per task (MMoE), a bounded union of choices, or experts of their own (PLE).

The data is synthetic: two regressions on the same features, whose weights have correlation 0.5 (MMoE, section 3).
"""

import torch
from torch import nn
from torch.nn import functional as F

from moeify import MoE
from moeify.experts import FFN, Plain
from moeify.routers import MultiGate, Router, SparseMultiGate

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
    """Experts that all tasks share, and a tower of its own for each: y_k = tower_k(Σ_j g_kj f_j(x))."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.moe = MoE(router, FFN(EXPERTS, FEATURES, 16, activation=Plain(F.relu), bias=True, width_out=16))
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(TASKS))

    def forward(self, x):
        answers = self.moe(x).unbind(1)  # one per gate
        return torch.cat([tower(answer) for tower, answer in zip(self.towers, answers, strict=True)], dim=1)


torch.manual_seed(1)
x, y = two_tasks(2000, correlation=0.5)
routers = {
    "MMoE": MultiGate(FEATURES, EXPERTS, gates=TASKS),
    "PLE": MultiGate(FEATURES, EXPERTS, gates=TASKS, private=2),
    "sparse": SparseMultiGate(FEATURES, EXPERTS, gates=TASKS, k=2, union=3),
}
print("synthetic data; a model that answers the mean has a loss of 1")
for name, router in routers.items():
    model = MultiTask(router)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(100):
            loss = F.mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    first, last = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
    assert last < 0.3
    asked = model.moe.router(x, model.moe.context).source.bincount().float().mean()
    print(f"{name:6}  loss {first:.3f} -> {last:.3f}, {asked:.1f} of {EXPERTS} experts per row")
