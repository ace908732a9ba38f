"""One classifier of text, image and sound: experts divide themselves by modality, as in LIMoE (2206.02770).

The domain of texts of CLINC150 (10), the super-class of photographs of caltech101-64 (11) and spoken digits (10), by
one small encoder that reads a batch of all three in one pass: every modality has an input layer, positions and a head
of its own, all between is shared, with top-2 of 12 experts of half the dense width in both layers. Routers see the
modality, by a learned vector that is added to what they read, or only the token. Against them: for each modality a
dense model of equal FLOPs per token, trained on as many of its samples. Reported are the accuracy by modality and the
mutual information of expert and modality, mean of the layers. Design, prediction and thresholds are in
claims/designs.md, written before the first run.

Failed if the classifier whose routers are not told is 5 points or more behind the model of any modality, in the mean.

    python claims/three_modalities.py     3 seeds, about 4 minutes on one core; rows in
                                          claims/results/three_modalities.csv
"""

from __future__ import annotations

import gzip
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import NamedTuple

import pyarrow.parquet
import torch
from common.images import photographs
from common.rates import UNREPORTED, parted, rates_of
from common.small import options
from common.statistics import paired
from common.training import train
from results import append
from torch import Tensor, nn
from torch.nn import functional as F

from moeify import Recipe, record, sparsify
from moeify.context import Context
from moeify.data import ByteTokenizer
from moeify.data.claim_files import data_file
from moeify.flops import count
from moeify.routers import Router, TopK
from moeify.routers.base import real_tokens
from moeify.routers.labelled import Labelled
from moeify.routing import Routing
from moeify.sparsify import fresh
from moeify.statistics import information

MODALITIES = ("texts", "pictures", "sounds")
CLASSES = {"texts": 10, "pictures": 11, "sounds": 10}
LENGTHS = {"texts": 48, "pictures": 16, "sounds": 24}
PATCH, FRAMES, BINS = 8, 2, 64
WIDTH, LAYERS, HEADS, HIDDEN, EXPERTS, K = 64, 2, 4, 128, 12, 2
EACH = 12


@dataclass(frozen=True)
class Part:
    """Samples of a modality, which of their tokens are real, and their classes."""

    x: Tensor
    real: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Tensor) -> Part:
        return Part(self.x[chosen], self.real[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


def texts(part: str) -> Part:
    """Bytes, (texts, 48)."""
    with gzip.open(data_file(f"intents/clinc150-{part}.jsonl.gz"), "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row["domain"] != "oos"]
    domains = sorted({row["domain"] for row in rows})
    coded = [{"input_ids": ByteTokenizer().encode(row["text"])[: LENGTHS["texts"]]} for row in rows]
    padded = ByteTokenizer().pad(coded, padding="max_length", max_length=LENGTHS["texts"])
    labels = torch.tensor([domains.index(row["domain"]) for row in rows])
    return Part(padded["input_ids"], padded["attention_mask"].bool(), labels)


def pictures(part: str) -> Part:
    """Patches of 8 by 8 pixels, (pictures, 16, 192)."""
    images = photographs(part, column="super")
    patches = F.unfold(images.pixels, PATCH, stride=PATCH).mT
    return Part(patches, torch.ones(patches.shape[:2], dtype=torch.bool), images.labels)


def sounds(part: str) -> Part:
    """Logarithms of the spectrum every 16 ms, two of them a token, (sounds, 24, 128)."""
    table = pyarrow.parquet.read_table(io.BytesIO(data_file(f"spoken-digits/{part}.parquet").read_bytes()))
    rows = table.select(["pcm16", "digit"]).to_pylist()
    samples = 128 * FRAMES * LENGTHS["sounds"]
    waves = [torch.frombuffer(bytearray(row["pcm16"]), dtype=torch.int16)[:samples].float() / 2**15 for row in rows]
    wave = torch.stack([F.pad(each, (0, samples - len(each))) for each in waves])
    spectrum = torch.stft(wave, 256, 128, window=torch.hann_window(256), return_complex=True).abs()
    spectrum = spectrum[:, : 2 * BINS, : FRAMES * LENGTHS["sounds"]].unflatten(1, (BINS, 2)).mean(2).mT
    tokens = (spectrum + 1e-3).log().reshape(len(rows), LENGTHS["sounds"], FRAMES * BINS)
    labels = torch.tensor([row["digit"] for row in rows])
    return Part((tokens + 4) / 2, torch.ones(tokens.shape[:2], dtype=torch.bool), labels)


READ: dict[str, Callable[[str], Part]] = {"texts": texts, "pictures": pictures, "sounds": sounds}


class Found(NamedTuple):
    """The logits of every modality, and the sum of their losses."""

    logits: dict[str, Tensor]
    loss: Tensor


class Classifier(nn.Module):
    """A transformer encoder of several modalities, as sequences of one batch.

    Args:
        modalities: those that it reads.
    """

    def __init__(self, modalities: tuple[str, ...] = MODALITIES) -> None:
        super().__init__()
        first: dict[str, Callable[[], nn.Module]] = {
            "texts": partial(nn.Embedding, ByteTokenizer.vocab_size, WIDTH),
            "pictures": partial(nn.Linear, 3 * PATCH**2, WIDTH),
            "sounds": partial(nn.Linear, FRAMES * BINS, WIDTH),
        }
        self.modalities = modalities
        self.first = nn.ModuleDict({name: first[name]() for name in modalities})
        self.positions = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(LENGTHS[name], WIDTH)) for name in modalities}
        )
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, CLASSES[name]) for name in modalities})

    def forward(self, parts: Mapping[str, Part], modality: Tensor) -> Found:
        """Classify samples of some modalities; `modality` is the number of that of every sequence, for routers."""
        longest = max(LENGTHS[name] for name in parts)
        x, real = [], []
        for name, part in parts.items():
            beyond = longest - LENGTHS[name]
            x.append(F.pad(self.first[name](part.x) + self.positions[name], (0, 0, 0, beyond)))
            real.append(F.pad(part.real, (0, beyond)))
        hidden = torch.cat(real)
        y = self.norm(self.encoder(torch.cat(x), src_key_padding_mask=~hidden))
        mean = (y * hidden.unsqueeze(-1)).sum(1) / hidden.sum(1, keepdim=True)
        of = dict(zip(parts, mean.split([len(part) for part in parts.values()]), strict=True))
        logits = {name: self.heads[name](of[name]) for name in parts}
        losses = [F.cross_entropy(logits[name], part.labels) for name, part in parts.items()]
        return Found(logits, torch.stack(losses).sum())


class Told(Router):
    """Lets another router see which modality a token is of: a learned vector is added to what it reads.

    Args:
        router: the other one.
        width: D.
    """

    def __init__(self, router: Router, width: int) -> None:
        super().__init__()
        self.router, self.causal, self.weights_sum_to_one = router, router.causal, router.weights_sum_to_one
        self.table = nn.Parameter(0.02 * torch.randn(len(MODALITIES), width))

    def forward(self, x: Tensor, context: Context) -> Routing:
        tokens = real_tokens(x, context)
        added = self.table[tokens.keys(context, "modality")]
        if tokens.positions is not None:
            added = added.new_zeros(math.prod(tokens.shape), x.shape[-1]).index_copy(0, tokens.positions, added)
        return self.router(x + added.view_as(x), context)


def given(parts: Mapping[str, Part]) -> dict[str, object]:
    """What a classifier is called with."""
    of = [torch.full((len(part),), MODALITIES.index(name)) for name, part in parts.items()]
    return {"parts": parts, "modality": torch.cat(of)}


def drawn(learnt: Mapping[str, Part]) -> Callable[[torch.Generator], dict[str, object]]:
    """Batches of as many samples of each modality, at random."""
    return lambda dice: given(
        {name: part[torch.randint(len(part), (EACH,), generator=dice)] for name, part in learnt.items()}
    )


def untold(width: int, num_experts: int) -> Router:
    return Labelled(TopK(width, num_experts, k=K), key="modality")


def told(width: int, num_experts: int) -> Router:
    return Labelled(Told(TopK(width, num_experts, k=K), width), key="modality")


def sparse(router: Callable[[int, int], Router], probe: dict[str, object]) -> nn.Module:
    recipe = Recipe(num_experts=EXPERTS, router=router, experts=partial(fresh, hidden=HIDDEN // K))
    return sparsify(Classifier(), recipe, probe=probe, verbose=False)


@torch.no_grad()
def accuracy(model: nn.Module, name: str, part: Part) -> float:
    """In percent."""
    found = [
        model(**given({name: some})).logits[name].argmax(-1) == some.labels
        for some in (part[at] for at in torch.arange(len(part)).split(200))
    ]
    return 100 * torch.cat(found).float().mean().item()


@torch.no_grad()
def bits(model: nn.Module, unseen: Mapping[str, Part]) -> float:
    """The mutual information of expert and modality, of as many samples of each; mean of the layers."""
    with record(model) as decisions:
        model(**given({name: part[torch.arange(200)] for name, part in unseen.items()}))
    found = []
    for routing in decisions.values():
        rows = torch.zeros(len(MODALITIES), EXPERTS)
        label = routing.evidence.label.unsqueeze(1).expand_as(routing.choices.indices)
        rows.index_put_((label, routing.choices.indices), torch.ones(label.shape), accumulate=True)
        found.append(information(rows / rows.sum(1, keepdim=True)).item())
    return fmean(found)


def main() -> None:
    chosen = options(__doc__, steps=400, rate=2e-3)
    torch.set_num_threads(1)
    learnt = {name: read("train") for name, read in READ.items()}
    unseen = {name: read("test") for name, read in READ.items()}
    probe = drawn(learnt)(torch.Generator().manual_seed(0))
    arms: dict[str, tuple[tuple[str, ...], Callable[[], nn.Module]]] = {
        **{f"dense, {name}": ((name,), partial(Classifier, (name,))) for name in MODALITIES},
        "not told": (MODALITIES, partial(sparse, untold, probe)),
        "told": (MODALITIES, partial(sparse, told, probe)),
    }
    rest, most = ({name: part[parted(len(part))[which]] for name, part in learnt.items()} for which in range(2))

    def run(arm: str, seed: int, rate: float, data: Mapping[str, Part]) -> nn.Module:
        torch.manual_seed(seed)
        of, build = arms[arm]
        draw = drawn({name: data[name] for name in of})
        return train(build(), draw, chosen.steps, seed, rate, objective=lambda model, batch: model(**batch).loss).eval()

    def error(arm: str, rate: float) -> float:
        model = run(arm, UNREPORTED, rate, most)
        return 100 - fmean(accuracy(model, name, rest[name]) for name in arms[arm][0])

    rates = rates_of("three_modalities", arms, chosen, error)
    ends: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in of} for arm, (of, _) in arms.items()}
    known: dict[str, list[float]] = {"not told": [], "told": []}
    rows = []
    for seed in chosen.seeds:
        for arm, rate in rates.items():
            began, of = time.process_time(), arms[arm][0]
            model = run(arm, seed, rate, learnt)
            for name in of:
                ends[arm][name].append(accuracy(model, name, unseen[name]))
            if arm in known:
                known[arm].append(bits(model, unseen))
            counted = count(model, LENGTHS["texts"])
            rows.append({
                "hardware": chosen.hardware, "arm": arm, "seed": seed, "steps": chosen.steps,
                "samples_of_each": chosen.steps * EACH, "rate": rate,
                **{name: f"{ends[arm][name][-1]:.2f}" if name in of else "" for name in MODALITIES},
                "bits": f"{known[arm][-1]:.3f}" if arm in known else "", "parameters": counted.parameters,
                "active_parameters": counted.active_parameters, "cpu_seconds": f"{time.process_time() - began:.0f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    behind = {}
    for arm in known:
        for name in MODALITIES:
            separate = ends[f"dense, {name}"][name]
            behind[arm, name] = fmean(separate) - fmean(ends[arm][name])
            print(f"{arm}, {name}: {fmean(ends[arm][name]):.2f} %, less dense {paired(ends[arm][name], separate)}")
        print(f"{arm}: {fmean(known[arm]):.2f} bits of {math.log2(len(MODALITIES)):.2f}")
    result = "failed" if max(behind["not told", name] for name in MODALITIES) >= 5 else "reproduced"
    print(result)
    for row in rows:
        append("three_modalities", row | {"result": result})


if __name__ == "__main__":
    main()
