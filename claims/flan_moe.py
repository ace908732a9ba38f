"""FLAN-MoE (arXiv 2305.14705): instructions help a sparse model more than a dense one.

A small byte-level Llama, dense and with top-1 of 8 experts at equal FLOPs, learns the text that came with Python once.
Both are tuned on ten data sets of instruct-mix, (a) on each alone and (b) on all together with ten times the steps of
one, and measured in nats per byte of the answers: (a) on test rows of the same data set, mean of the ten, (b) on those
of two data sets that were left out, and for comparison on the ten. Compared is the loss of the sparse model less that
of the dense one. A seed is the order of the data. Design, prediction and thresholds are in claims/designs.md, written
before the first run.

Reproduced if that difference is lower in (b), on data sets that were left out, than in (a), in the mean over seeds.

Rates are chosen by a tenth of the rows that are tuned on otherwise, for a data set alone and for all together.

    python claims/flan_moe.py     3 seeds, about 5 minutes on one core; rows in claims/results/flan_moe.csv
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import fmean

import torch
from common.bases import SMALL_STEPS, small_bases
from common.documents import Base, Blocks, Collection
from common.rates import UNREPORTED, add_rates, parted, rates_of
from common.small import BATCH, text
from common.statistics import paired
from common.training import Batches, held_out, train
from results import append
from torch import Tensor, nn

from moeify.data import ByteTokenizer

DATA = Collection(
    "instruct-mix", "test", "dataset",
    (
        "banking77", "clinc150", "snips", "gsm8k", "common_gen", "techdocs_mt", "commonsense_qa", "paws", "qasc",
        "kilt_tasks",
    ),
    ("quartz", "dbpedia_14"), 64,
)  # fmt: skip
ARMS = ("dense", "sparse")
SETTINGS = ("alone", "left out", "together")


def of(*sets: Blocks) -> Batches:
    """Batches of blocks, each of a data set that is drawn anew."""

    def draw(dice: torch.Generator) -> Blocks:
        chosen = [sets[i] for i in torch.randint(len(sets), (BATCH,), generator=dice).tolist()]
        at = [int(torch.randint(len(blocks), (), generator=dice)) for blocks in chosen]
        return Blocks(
            *(
                torch.stack([getattr(blocks, side)[i] for blocks, i in zip(chosen, at, strict=True)])
                for side in ("ids", "labels")
            )
        )

    return draw


def answered(model: nn.Module, blocks: Blocks) -> Tensor:
    """The loss of the answers."""
    return model(input_ids=blocks.ids, labels=blocks.labels).loss


@torch.no_grad()
def loss(model: nn.Module, blocks: Blocks) -> float:
    """Nats per byte of the answers."""
    total, count = 0.0, 0
    for part in (blocks[at] for at in torch.arange(len(blocks)).split(32)):
        counted = int((part.labels[:, 1:] >= 0).sum())
        total, count = total + counted * answered(model.eval(), part).item(), count + counted
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of one data set alone")
    add_rates(parser, 1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = text()
    bases = small_bases(data.learnt)
    for arm, base in bases.items():
        print(f"{arm} base: {held_out(base, data.unseen):.4f} nats per byte", flush=True)
    cut = Base(bases["dense"], ByteTokenizer().encode, ByteTokenizer.eos_token_id).blocks
    own = {name: cut(rows) for name, rows in DATA.read("train", DATA.own).items()}
    tests = {name: cut(rows)[: DATA.blocks] for name, rows in DATA.read(DATA.test, DATA.own + DATA.unseen).items()}
    rest, most = ({name: part[parted(len(part))[i]] for name, part in own.items()} for i in range(2))

    def tuned(arm: str, steps: int, seed: int, rate: float, *sets: Blocks) -> nn.Module:
        torch.manual_seed(seed)
        return train(copy.deepcopy(bases[arm]), of(*sets), steps, seed, rate, objective=answered)

    def error(way: tuple[str, bool], rate: float) -> float:
        arm, together = way
        if together:
            model = tuned(arm, options.steps * len(own), UNREPORTED, rate, *most.values())
            return fmean(loss(model, rest[name]) for name in own)
        return fmean(loss(tuned(arm, options.steps, UNREPORTED, rate, most[name]), rest[name]) for name in own)

    ways = [(arm, together) for arm in ARMS for together in (False, True)]
    rates = rates_of("flan_moe", ways, options, error, corpus=data.corpus)
    ends: dict[str, dict[str, list[float]]] = {arm: {setting: [] for setting in SETTINGS} for arm in ARMS}
    rows = []
    for seed in options.seeds:
        for arm in ARMS:
            began = time.process_time()
            rate, rate_together = rates[arm, False], rates[arm, True]
            alone = {name: loss(tuned(arm, options.steps, seed, rate, own[name]), tests[name]) for name in DATA.own}
            model = tuned(arm, options.steps * len(own), seed, rate_together, *own.values())
            everything = {name: loss(model, blocks) for name, blocks in tests.items()}
            means = {
                "alone": fmean(alone.values()),
                "left out": fmean(everything[name] for name in DATA.unseen),
                "together": fmean(everything[name] for name in DATA.own),
            }
            for setting, value in means.items():
                ends[arm][setting].append(value)
            rows.append({
                "hardware": options.hardware, "arm": arm, "seed": seed, "base_steps": SMALL_STEPS,
                "steps": options.steps, "rate": rate, "rate_together": rate_together,
                **{f"loss_{name.replace(' ', '_')}": f"{v:.4f}" for name, v in means.items()},
                **{f"untuned_{name}": f"{loss(bases[arm], tests[name]):.4f}" for name in DATA.unseen},
                "by_data_set": "; ".join(f"{name} {alone.get(name, 0):.4f} {v:.4f}" for name, v in everything.items()),
                "cpu_seconds": f"{time.process_time() - began:.0f}", "corpus": data.corpus,
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    less = {
        setting: [a - b for a, b in zip(ends["sparse"][setting], ends["dense"][setting], strict=True)]
        for setting in SETTINGS
    }
    for setting in SETTINGS:
        print(f"{setting}: sparse less dense {paired(ends['sparse'][setting], ends['dense'][setting])}")
    print("left out less alone:", paired(less["left out"], less["alone"]))
    result = "reproduced" if fmean(less["left out"]) < fmean(less["alone"]) else "failed"
    print(result)
    for row in rows:
        append("flan_moe", row | {"result": result})


if __name__ == "__main__":
    main()
