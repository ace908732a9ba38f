"""MoCLE (arXiv 2312.12379, section 4): under conflicting tasks, experts by cluster of instructions beat one adapter.

Somebody else's dense model, stories260K, stays frozen; low-rank adapters of total rank 40 beside the maps to queries,
values and out of the FFN learn ten short tasks of instruct-mix at once, among them English to be put into four
languages. The arms spend the 40 ranks differently: one adapter; one per task, told the task; MoCLE's four experts and a
universal one, told the cluster of the instruction by k-means on the base's own mean hidden states; and five experts by
cluster without a universal one. Held out are a fifth language, three question-answering sets, and BIG-Bench Hard; an
adapter per task has none for them, and answers by that of another task. Only the answer's tokens count. Every arm
learns at two rates, because the arms' scales, 32 / rank, ask for different ones.

    python claims/mocle.py          3 seeds, about 4 minutes each on one core; appends to claims/results/mocle.csv
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

import torch
import transformers
from results import append
from torch import Tensor, nn

from moeify import Recipe, record, sparsify
from moeify.compose import Clusters, MeanPooling, cluster
from moeify.data.claim_files import data_file
from moeify.find import linears
from moeify.routers import Cluster, Lookup, TopK
from moeify.routers.lookup import split_router_inputs
from moeify.sparsify import frozen, lora
from moeify.train import trainable
from moeify.train.freeze import freeze

SEEN = (
    "banking77", "clinc150", "snips", "common_gen", "commonsense_qa", "qasc",
    "translate_en_es", "translate_en_fr", "translate_en_ko", "translate_en_zh",
)  # fmt: skip
NEAR = ("translate_en_pt_BR", "quartz", "kilt_tasks", "paws")
PARTS = {"seen": SEEN, "near": NEAR, "far": ("bbh",)}
MAPS = r"q_proj|v_proj|down_proj"
LONGEST, TRAIN_ROWS, TEST_ROWS = 112, 480, 24
CLUSTERS, RANK, ALPHA, BATCH = 16, 40, 32.0, 12


def adapters(router, experts: int) -> Recipe:
    """Low-rank experts beside every linear map, which share the 40 ranks."""
    rank = RANK // experts
    made = partial(lora, rank=rank, scale=ALPHA / rank)
    return Recipe(where=linears(MAPS), num_experts=experts, router=router, experts=made, shared=frozen)


by_cluster = partial(Cluster, clusters=CLUSTERS)
ARMS: dict[str, Recipe | None] = {
    "base": None,
    "one adapter": adapters(partial(TopK, k=1), 1),
    "one per task": adapters(partial(Lookup, key="task", size=len(SEEN)), len(SEEN)),
    "MoCLE": adapters(by_cluster, 5),
    "MoCLE, temperature 1": adapters(partial(by_cluster, temperature=1.0), 5),
    "MoCLE without universal": adapters(partial(by_cluster, universal=False), 5),
}


@dataclass
class Sample:
    """An instruction and its answer as tokens, the number of its task and, once found, of its cluster."""

    text: str
    asked: list[int]
    answered: list[int]
    task: int
    cluster: int = 0


def base() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    folder = data_file("stories260k/hf/model.safetensors").parent
    for file in ("config.json", "tokenizer.json"):
        data_file(f"stories260k/hf/{file}")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def samples(part: str, tokenizer, tasks: tuple[str, ...], rows: int) -> dict[str, list[Sample]]:
    """Up to so many short samples of every task, in one random order; a language of techdocs_mt is a task."""
    found: dict[str, list[Sample]] = {task: [] for task in tasks}
    with gzip.open(data_file(f"instruct-mix/{part}.jsonl.gz"), "rt") as lines:
        shuffled = [json.loads(line) for line in lines]
    random.Random(0).shuffle(shuffled)
    for row in shuffled:
        kind = "bbh" if part == "heldout-bbh" else row["dataset"]
        task = row["task"] if kind == "techdocs_mt" else kind
        if len(found.get(task, [None] * rows)) < rows:
            asked = tokenizer.encode(row["input"] + "\n")
            answered = [*tokenizer.encode(row["target"], add_special_tokens=False), tokenizer.bos_token_id]
            if len(asked) + len(answered) <= LONGEST:
                found[task].append(Sample(row["input"], asked, answered, tasks.index(task)))
    return found


def together(chosen: list[Sample]) -> dict[str, Tensor]:
    """A padded batch; labels of what was asked and of padding are -100."""

    def padded(rows: list[list[int]], filling: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, filling)

    return {
        "input_ids": padded([s.asked + s.answered for s in chosen], 0),
        "attention_mask": padded([[1] * (len(s.asked) + len(s.answered)) for s in chosen], 0),
        "labels": padded([[-100] * len(s.asked) + s.answered for s in chosen], -100),
        "task": torch.tensor([s.task for s in chosen]),
        "cluster": torch.tensor([s.cluster for s in chosen]),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with split_router_inputs(model, batch) as inputs:
        return model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}).loss


def learn(model: nn.Module, learnt: list[Sample], steps: int, seed: int, rate: float) -> None:
    """AdamW with a short warm-up and a linear decay to nothing."""
    dice = random.Random(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05, anneal_strategy="linear")
    model.train()
    for _ in range(steps):
        loss(model, together(dice.sample(learnt, BATCH))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out(model: nn.Module, unseen: list[Sample]) -> float:
    """Nats per token of the answers, each sample's mean counted by its tokens."""
    model.eval()
    unseen, total, tokens = sorted(unseen, key=lambda s: len(s.asked)), 0.0, 0
    for start in range(0, len(unseen), 24):
        chosen = unseen[start : start + 24]
        size = sum(len(s.answered) for s in chosen)
        total, tokens = total + size * loss(model, together(chosen)).item(), tokens + size
    return total / tokens


@torch.no_grad()
def universal_weight(model: nn.Module, unseen: list[Sample]) -> float:
    """The mean weight of the last expert over layers and samples."""
    with record(model.eval()) as decisions:
        loss(model, together(unseen))
    return fmean(routing.choices.weights[:, -1].mean().item() for routing in decisions.values())


def purity(learnt: list[Sample]) -> float:
    """The share of samples whose task is the most frequent one of their cluster."""
    counts = torch.zeros(CLUSTERS, len(SEEN)).index_put_(
        (torch.tensor([s.cluster for s in learnt]), torch.tensor([s.task for s in learnt])),
        torch.tensor(1.0), accumulate=True,
    )  # fmt: skip
    return (counts.amax(1).sum() / counts.sum()).item()


def mark(found: Clusters, embed: MeanPooling, unmarked: list[Sample]) -> None:
    """Write into every sample the cluster of its instruction."""
    for sample, number in zip(unmarked, found.column([s.text for s in unmarked], embed), strict=True):
        sample.cluster = number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument(
        "--layers", type=int, default=0,
        help="of the base that embeds instructions, all by default; of fewer, rows are in a file of their own",
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense, tokenizer = base()
    if options.layers:
        dense.model.layers = dense.model.layers[: options.layers]
    embed = MeanPooling(dense, tokenizer)
    learnt = [s for rows in samples("train", tokenizer, SEEN, TRAIN_ROWS).values() for s in rows]
    near = samples("test", tokenizer, SEEN + NEAR, TEST_ROWS)
    test = near | samples("heldout-bbh", tokenizer, (*SEEN, *NEAR, "bbh"), 4 * TEST_ROWS)
    test = {task: near.get(task) or rows for task, rows in test.items()}
    runs = [(arm, rate) for arm in options.arms for rate in (options.rates if ARMS[arm] else [0.0])]
    ends: dict[tuple[str, float], list[dict[str, float]]] = {run: [] for run in runs}
    for seed in options.seeds:
        groups = cluster([s.text for s in learnt], embed, CLUSTERS, seed=seed)
        mark(groups, embed, [s for rows in (learnt, *test.values()) for s in rows])
        print(
            f"seed {seed}: {len(learnt)} samples, {purity(learnt):.3f} of them in a cluster of their task", flush=True
        )
        for arm, rate in runs:
            torch.manual_seed(seed)
            model, recipe = base()[0], ARMS[arm]
            learning = {"experts": 0, "router": 0}
            if recipe is not None:
                sparsify(model, recipe, verbose=False)
                freeze(model, "base", verbose=False)
                learning |= {row.part: row.trained for row in trainable(model).rows if row.part in learning}
                learn(model, learnt, options.steps, seed, rate)
            found = {task: held_out(model, rows) for task, rows in test.items()}
            means = {part: fmean(found[task] for task in tasks) for part, tasks in PARTS.items()}
            asked = "MoCLE" in arm and "without" not in arm
            weight = f"{universal_weight(model, [rows[0] for rows in test.values()]):.1e}" if asked else ""
            append(f"mocle_layers_{options.layers}" if options.layers else "mocle", {
                "arm": arm, "seed": seed, "steps": options.steps, "rate": rate,
                "expert_parameters": learning["experts"], "router_parameters": learning["router"],
                "purity": f"{purity(learnt):.3f}", "weight_of_universal": weight,
                **{f"loss_{part}": f"{value:.4f}" for part, value in means.items()},
                **{task: f"{value:.4f}" for task, value in found.items()},
            })  # fmt: skip
            ends[arm, rate].append(means)
            told = "  ".join(f"{part} {value:.4f}" for part, value in means.items())
            print(f"seed {seed}  {arm:24} {rate:g}  {told}  {weight}", flush=True)
    for (arm, rate), seeds in ends.items():
        told = []
        for part in PARTS:
            values = [means[part] for means in seeds]
            told.append(f"{part} {fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else ""))
        print(f"{arm:24} {rate:g}  {'  '.join(told)}")


if __name__ == "__main__":
    main()
