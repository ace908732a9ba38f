"""Expert dropout (Switch, arXiv 2101.03961, section 2.4 and table 4): more dropout inside experts than elsewhere.

A small byte-level Llama, dense and with top-1 of 8 experts, learns the text that came with Python once, and is then
tuned on 500 texts of CLINC150, whose domain, one of 10, is to be named. Dropout is that of T5: after the embedding,
after every attention and feed-forward layer, on attention weights, and inside feed-forward layers. Arms: 0.1, dense and
sparse; 0.3 everywhere; 0.1, and 0.4 inside experts. Every arm has the better of two rates, by the accuracy on
validation texts of a seed that is not reported. Reported is the accuracy on 2,250 test texts; a seed is the choice of
the 500 texts, the head and the order. Design, prediction and thresholds are in claims/designs.md, written before the
first run.

Failed if 0.4 inside experts is behind 0.1 everywhere by more than the 95 % interval of the differences paired by seed.

    python claims/expert_dropout.py     10 seeds, about 8 minutes on one core; rows in claims/results/expert_dropout.csv
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import time
from dataclasses import dataclass
from statistics import fmean

import torch
from common.bases import SMALL_STEPS, small_bases
from common.small import WIDTH, text
from common.statistics import interval, paired
from common.training import Batches, held_out, train
from results import append
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.data import ByteTokenizer
from moeify.data.claim_files import data_file
from moeify.experts import FFN

LENGTH, TEXTS, TUNED_BATCH, UNREPORTED = 48, 500, 32, 100


@dataclass(frozen=True)
class Arm:
    """Which base is tuned, and with how much dropout."""

    base: str
    everywhere: float
    inside: float


ARMS = {
    "dense, 0.1": Arm("dense", 0.1, 0.1),
    "0.1": Arm("sparse", 0.1, 0.1),
    "0.3": Arm("sparse", 0.3, 0.3),
    "0.1, experts 0.4": Arm("sparse", 0.1, 0.4),
}


@dataclass(frozen=True)
class Texts:
    """Bytes, (texts, LENGTH), which of them are real, and the domain of each text."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Tensor | slice) -> Texts:
        return Texts(self.ids[chosen], self.mask[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.ids)


def read(part: str) -> Texts:
    """The texts of a part that have a domain, in their order."""
    with gzip.open(data_file(f"intents/clinc150-{part}.jsonl.gz"), "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row["domain"] != "oos"]
    domains = sorted({row["domain"] for row in rows})
    coded = [{"input_ids": ByteTokenizer().encode(row["text"])[:LENGTH]} for row in rows]
    padded = ByteTokenizer().pad(coded, padding="max_length", max_length=LENGTH)
    labels = torch.tensor([domains.index(row["domain"]) for row in rows])
    return Texts(padded["input_ids"], padded["attention_mask"], labels)


class Classifier(nn.Module):
    """A linear map from the mean of a language model's last states to ten classes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.head = base, nn.Linear(WIDTH, 10)

    def forward(self, texts: Texts) -> Tensor:
        found = self.base(
            input_ids=texts.ids, attention_mask=texts.mask, output_hidden_states=True, logits_to_keep=1
        ).hidden_states[-1]
        real = texts.mask.unsqueeze(-1)
        return self.head((found * real).sum(1) / real.sum(1))


def dropping(base: nn.Module, arm: Arm) -> nn.Module:
    """The base, with dropout in training."""

    def after(module: nn.Module, given: object, output: Tensor) -> Tensor:
        return F.dropout(output, arm.everywhere, module.training)

    def before(module: nn.Module, given: tuple[Tensor]) -> Tensor:
        return F.dropout(given[0], arm.inside, module.training)

    base.model.embed_tokens.register_forward_hook(after)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = arm.everywhere
        layer.self_attn.o_proj.register_forward_hook(after)
        layer.mlp.register_forward_hook(after)
        if arm.base == "dense":
            layer.mlp.down_proj.register_forward_pre_hook(before)
    for part in base.modules():
        if isinstance(part, FFN):
            part.dropout.p = arm.inside
    return base


def of(texts: Texts) -> Batches:
    """Batches of the texts, at random."""
    return lambda dice: texts[torch.randint(len(texts), (TUNED_BATCH,), generator=dice)]


def named(model: nn.Module, texts: Texts) -> Tensor:
    """The loss of naming the domain."""
    return F.cross_entropy(model(texts), texts.labels)


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts) -> float:
    """In percent."""
    parts = [model(texts[at]).argmax(-1) for at in torch.arange(len(texts)).split(250)]
    return 100 * (torch.cat(parts) == texts.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = text()
    bases = small_bases(data.learnt)
    for name, base in bases.items():
        print(f"{name} base: {held_out(base, data.unseen):.4f} nats per byte", flush=True)
    pool, validation, test = read("train"), read("validation")[::2], read("test")[::2]

    def tuned(arm: Arm, seed: int, rate: float) -> nn.Module:
        torch.manual_seed(seed)
        model = Classifier(dropping(copy.deepcopy(bases[arm.base]), arm))
        chosen = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:TEXTS]]
        return train(model, of(chosen), options.steps, seed, rate, objective=named).eval()

    rates = {}
    for name, arm in ARMS.items():
        found = {rate: accuracy(tuned(arm, UNREPORTED, rate), validation) for rate in options.rates}
        rates[name] = max(found, key=found.get)
        print(f"{name}: validation", *(f"{value:.1f} % at {rate:g}" for rate, value in found.items()), flush=True)
    ends: dict[str, list[float]] = {name: [] for name in ARMS}
    rows = []
    for seed in options.seeds:
        for name, arm in ARMS.items():
            began = time.process_time()
            ends[name].append(accuracy(tuned(arm, seed, rates[name]), test))
            rows.append({
                "hardware": options.hardware, "arm": name, "seed": seed, "base_steps": SMALL_STEPS,
                "steps": options.steps, "texts": TEXTS, "rate": rates[name], "accuracy": f"{ends[name][-1]:.2f}",
                "cpu_seconds": f"{time.process_time() - began:.0f}", "corpus": data.corpus,
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    for name, values in ends.items():
        print(f"{name}: {fmean(values):.2f} %, less 0.1 {paired(values, ends['0.1'])}")
    result = "failed" if interval(ends["0.1, experts 0.4"], ends["0.1"])[2] < 0 else "reproduced"
    print(result)
    for row in rows:
        append("expert_dropout", row | {"result": result})


if __name__ == "__main__":
    main()
