"""Traces for tests, made by hand or at random."""

import torch

from moeify.inspect.trace import LayerTrace, Tokens, Trace


def trace_of(*experts: list[list[int]], num_experts: int = 4, weights=None, scores=None, dropped=None, **columns):
    """A trace of one layer for each list of a token's experts."""
    tokens = Tokens(len(experts[0]), **columns)
    layers = {
        f"layers.{i}.mlp": LayerTrace(
            name=f"layers.{i}.mlp", num_experts=num_experts, tokens=tokens, experts=torch.tensor(chosen),
            weights=weights, scores=scores, dropped=dropped,
        )
        for i, chosen in enumerate(experts)
    }  # fmt: skip
    return Trace(layers=layers, header={"model": "by hand"})


HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>\u202e"


def random_trace(
    layers: int = 3,
    experts: int = 8,
    k: int = 2,
    sequences: int = 12,
    length: int = 16,
    decoded: int = 8,
    seed: int = 0,
) -> Trace:
    """A trace with every column, whose experts follow the domain; the vocabulary has a token that attacks the page."""
    generator = torch.Generator().manual_seed(0)
    count = sequences * length
    sequence, position = torch.arange(count) // length, torch.arange(count) % length
    phase = (position >= length - decoded).long()
    domain = sequence % 3
    ids = torch.randint(20, (count,), generator=generator)
    texts = {i: f" word{i}" for i in range(20)} | {0: HOSTILE, 1: "\n", 2: "да", 3: "7"}
    tokens = Tokens(
        count, ids=ids, sequence=sequence, position=position, phase=phase, domain=domain, batch=sequence // 4,
        step=torch.where(phase == 1, position - (length - decoded) + 1, 0), domains=("code", "<b>prose", "dialogue"),
        vocabulary=texts,
    )  # fmt: skip
    found = {}
    for i in range(layers):
        logits = torch.randn(count, experts, generator=generator)
        logits[torch.arange(count), domain * 2] += 2
        scores = logits.softmax(-1)
        best = scores.topk(k)
        dropped = torch.rand(count, k, generator=generator) < 0.05
        found[f"model.layers.{i}.mlp"] = LayerTrace(
            name=f"model.layers.{i}.mlp", num_experts=experts, tokens=tokens, experts=best.indices,
            weights=best.values, scores=scores, dropped=dropped,
        )  # fmt: skip
    return Trace(layers=found, header={"model": HOSTILE, "format": "test"})
