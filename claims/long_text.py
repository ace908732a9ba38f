"""Text longer than what was trained on: loss, load and choices of experts by position, sparse and dense.

No paper's claim: whether routing depends on the position, and on what went before. The demo's model (recipe `matched`)
and its dense twin are trained at a length of 128 bytes on the text that came with Python and torch, and measured on
texts of 1,024: loss and MaxVio (mean of the layers) in four stretches of positions, and the share of choices of the
second half that change if the first half is removed. Design, prediction and thresholds are in claims/designs.md,
written before the first run.

Reproduced if the loss beyond 128 bytes, less that of the first 128, rises for the sparse model by at most 0.05 nats per
byte more than for the dense one.

    python claims/long_text.py     3 seeds, about 8 minutes on one core; rows in claims/results/long_text.csv
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from statistics import fmean

import torch
from common.small import options, trained
from common.statistics import paired
from results import append
from torch import Tensor, nn

from moeify import record, sparsify
from moeify.data import ByteTokenizer, blocks
from moeify.data.corpus import build_corpus
from moeify.layers import sparse_layers
from moeify.sparsify import recipes
from moeify.statistics import max_violation
from moeify.tasks.base import Shape
from moeify.tasks.lm import small_llama

SHORT, LONG, TEXTS = 128, 1024, 24
STRETCHES = ((0, 128), (128, 256), (256, 512), (512, 1024))


def built(is_sparse: bool) -> nn.Module:
    dense = small_llama(Shape(), SHORT)
    return sparsify(dense, recipes["matched"], verbose=False) if is_sparse else dense


def long_texts() -> Tensor:
    """Held-out blocks of 1,024 bytes, of all domains alike."""
    _, held = blocks(build_corpus(300_000), ByteTokenizer(), LONG)
    return held.input_ids[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:TEXTS]].long()


@torch.no_grad()
def measured(model: nn.Module, _: Tensor, *, texts: Tensor) -> Mapping[str, str]:
    """Loss and MaxVio by stretch; the share of choices of the first and the last layer that change with the past."""
    loss, whole = passed(model, texts)
    found = {f"loss_{begin}": f"{loss[:, begin:end].mean():.4f}" for begin, end in STRETCHES}
    found["rise"] = f"{loss[:, SHORT:].mean() - loss[:, :SHORT].mean():.4f}"
    for begin, end in STRETCHES:
        vio = [max_violation(layer[:, begin:end].sum((0, 1))).item() for layer in whole]
        found[f"max_vio_{begin}"] = f"{fmean(vio):.3f}" if vio else ""
    _, alone = passed(model, texts[:, LONG // 2 :])
    kept = [((a * b[:, LONG // 2 :]).sum() / a.sum()).item() for a, b in zip(alone, whole, strict=True)]
    for at, layer in ((0, "first"), (-1, "last")):
        found[f"changed_{layer}_layer"] = f"{100 * (1 - kept[at]):.1f}" if kept else ""
    return found


def passed(model: nn.Module, texts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss at every position but the last, and which experts every position chose, by layer: (texts, N, E)."""
    losses, chosen = [], []
    for part in texts.split(4):
        with record(model.eval()) if sparse_layers(model) else nullcontext({}) as decisions:
            logits = model(input_ids=part).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
        chosen.append([routing.reads().view(*part.shape, -1).float() for routing in decisions.values()])
    return torch.cat(losses), [torch.cat(layer) for layer in zip(*chosen, strict=True)]


def main() -> None:
    arms = {"dense": partial(built, False), "sparse": partial(built, True)}
    ends, rows = trained("long_text", "arm", arms, options(__doc__), measure=partial(measured, texts=long_texts()))
    rise = {arm: [float(row["rise"]) for row in rows if row["arm"] == arm] for arm in arms}
    for arm in arms:
        print(f"{arm}: {fmean(ends[arm]):.4f} at {SHORT}, rises by {fmean(rise[arm]):+.4f}")
    print("rise of sparse less dense:", paired(rise["sparse"], rise["dense"]))
    result = "reproduced" if fmean(rise["sparse"]) - fmean(rise["dense"]) < 0.05 else "failed"
    print(result)
    for row in rows:
        append("long_text", row | {"result": result})


if __name__ == "__main__":
    main()
