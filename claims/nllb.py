"""NLLB (arXiv 2207.04672, section 6.2): masked outputs keep experts from overfitting languages with few pairs.

Short English strings of techdocs-mt, at most 40 bytes, into Spanish and Portuguese with up to 4,000 pairs each, and
into French, Italian, Dutch and Indonesian with 150 each; every language is drawn equally often. A small encoder-decoder
of bytes, M2M100 with two layers on either side: dense; top-2 of 8 experts in every other layer, at twice the FLOPs of
its feed-forward layer, as in the paper; the same with a fifth of the combined outputs of experts masked (final output
masking), and with a fifth of the outputs of every expert masked (expert output masking). Reported is chrF of greedy
translations of test strings, pooled over the languages of either size and by language, and the loss. Design, prediction
and thresholds are in claims/designs.md, written before the first run.

Reproduced if final output masking is ahead of none on the languages with 150 pairs in every seed.

    python claims/nllb.py     3 seeds, about 6 minutes on one core; needs sacrebleu; rows in claims/results/nllb.csv
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import pyarrow.parquet
import torch
from common.rates import UNREPORTED, rates_of
from common.small import options
from common.statistics import paired
from common.training import train
from results import append
from torch import Tensor, nn

from moeify import Recipe, sparsify
from moeify.data.claim_files import data_file
from moeify.data.tagged import TaggedBytes
from moeify.find import every
from moeify.flops import count
from moeify.routers import TopK
from moeify.routers.nllb import final_mask
from moeify.sparsify import fresh, masked
from moeify.tasks.base import Shape
from moeify.tasks.rows import Row
from moeify.tasks.seq2seq import Translation, Translations, small_m2m100, translated

LARGE, SMALL = ("es", "pt_BR"), ("fr", "it", "nl", "id")
PAIRS = {**dict.fromkeys(LARGE, 4000), **dict.fromkeys(SMALL, 150)}
READ, WRITTEN, LENGTH, BATCH = 40, 48, 52, 30
MASKED = 0.2
SHAPE = Shape(width=64, layers=2, heads=4, hidden=128)

TOP_2 = partial(TopK, k=2)
ARMS: dict[str, Recipe | None] = {
    "dense": None,
    "sparse": Recipe(where=every(2), router=TOP_2, experts=fresh),
    "final masking": Recipe(where=every(2), router=partial(final_mask, router=TOP_2, p=MASKED), experts=fresh),
    "expert masking": Recipe(where=every(2), router=TOP_2, experts=partial(masked, experts=fresh, p=MASKED)),
}


def pairs(part: str) -> dict[str, list[Row]]:
    """The short pairs of every language, in a random order of their own, as many as are learnt from."""
    rows = pyarrow.parquet.read_table(data_file(f"techdocs-mt/{part}.parquet")).to_pylist()
    found: dict[str, list[Row]] = {}
    for language, most in PAIRS.items():
        short = [
            {"source": row["en"], "target": row["xx"], "language": language}
            for row in rows
            if row["lang"] == language and len(row["en"].encode()) <= READ and len(row["xx"].encode()) <= WRITTEN
        ]
        order = torch.randperm(len(short), generator=torch.Generator().manual_seed(0))[:most]
        found[language] = [short[i] for i in order.tolist()]
    return found


class Drawn:
    """Batches with as many pairs of each language, at random.

    Args:
        learnt: the pairs of every language.
        objective: makes a batch of samples.
    """

    def __init__(self, learnt: dict[str, list[Row]], objective: Translation) -> None:
        self.samples = [coded(rows, objective.tags) for rows in learnt.values()]
        self.objective = objective

    def __call__(self, dice: torch.Generator) -> dict[str, Tensor]:
        each = BATCH // len(self.samples)
        chosen = [some[i] for some in self.samples for i in torch.randint(len(some), (each,), generator=dice).tolist()]
        return self.objective.collate(chosen)


def coded(rows: Sequence[Row], tags: TaggedBytes) -> Translations:
    return Translations(
        rows, [(tags.source(r["source"], r["language"]), tags.target(r["target"], r["language"])) for r in rows]
    )


@torch.no_grad()
def measured(model: nn.Module, unseen: dict[str, list[Row]], objective: Translation) -> dict[str, float]:
    """ChrF and nats per token, of the languages of either size, and chrF by language."""
    found: dict[str, float] = {}
    written: dict[str, tuple[list[str], list[str]]] = {}
    losses: dict[str, list[float]] = {"large": [], "small": []}
    for language, rows in unseen.items():
        samples = coded(rows, objective.tags)
        of, texts = translated(model, samples, objective, len(rows))
        written[language] = texts, [row["target"] for row in of]
        size = "large" if language in LARGE else "small"
        losses[size] += objective.judge(model, objective.collate(list(samples))).losses.tolist()
    for size, languages in (("large", LARGE), ("small", SMALL)):
        texts = [[text for language in languages for text in written[language][side]] for side in range(2)]
        found[f"chrf_{size}"], found[f"loss_{size}"] = chrf(*texts), fmean(losses[size])
    return found | {f"chrf_{language}": chrf(*texts) for language, texts in written.items()}


@torch.no_grad()
def missed(model: nn.Module, samples: Sequence[dict[str, Any]], objective: Translation) -> float:
    """Nats per token."""
    return fmean(objective.judge(model, objective.collate(list(samples))).losses.tolist())


def chrf(written: list[str], right: list[str]) -> float:
    """Of a corpus.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    from sacrebleu.metrics.chrf import CHRF

    return CHRF().corpus_score(written, [right]).score


def main() -> None:
    chosen = options(__doc__, steps=250, rate=3e-3)
    torch.set_num_threads(1)
    tags = TaggedBytes(sorted(PAIRS))
    objective = Translation(tags)
    learnt, unseen = pairs("train"), pairs("test")
    print({language: (len(learnt[language]), len(unseen[language])) for language in PAIRS})
    draw = Drawn(learnt, objective)
    probe = draw(torch.Generator().manual_seed(0))

    def run(arm: str, seed: int, rate: float) -> nn.Module:
        torch.manual_seed(seed)
        model, recipe = small_m2m100(SHAPE, LENGTH, tags), ARMS[arm]
        if recipe is not None:
            sparsify(model, recipe, probe=probe, verbose=False)
        return train(model, draw, chosen.steps, seed, rate, objective=lambda model, batch: model(**batch).loss).eval()

    rest = [sample for rows in pairs("validation").values() for sample in coded(rows, tags)]
    rates = rates_of("nllb", ARMS, chosen, lambda arm, rate: missed(run(arm, UNREPORTED, rate), rest, objective))
    ends: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    rows = []
    for seed in chosen.seeds:
        for arm, rate in rates.items():
            began = time.process_time()
            model = run(arm, seed, rate)
            ends[arm].append(measured(model, unseen, objective))
            counted = count(model, LENGTH)
            rows.append({
                "hardware": chosen.hardware, "arm": arm, "seed": seed, "steps": chosen.steps,
                "pairs": chosen.steps * BATCH, "rate": rate,
                **{name: f"{value:.4f}" for name, value in ends[arm][-1].items()},
                "parameters": counted.parameters, "flops": counted.flops,
                "cpu_seconds": f"{time.process_time() - began:.0f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    of = {arm: {name: [end[name] for end in found] for name in found[0]} for arm, found in ends.items()}
    for name in ("chrf_large", "chrf_small", "loss_large", "loss_small"):
        for arm in ARMS:
            print(f"{name}, {arm}: {fmean(of[arm][name]):.3f}, less sparse {paired(of[arm][name], of['sparse'][name])}")
    ahead = [a > b for a, b in zip(of["final masking"]["chrf_small"], of["sparse"]["chrf_small"], strict=True)]
    result = "reproduced" if all(ahead) else "failed"
    print(result)
    for row in rows:
        append("nllb", row | {"result": result})


if __name__ == "__main__":
    main()
