"""PHATGOOSE (arXiv 2402.05859, section 4): adapters that were trained apart, composed per token by gates trained after.

One LoRA per domain is trained alone beside every linear map of a frozen base, then a gate per map, all else frozen. The
adapters become one library, evaluated on their own domains, domains that nobody trained on, and documents whose halves
are of two domains, under one router after the other. Two bases (stories260K, somebody else's, and a small byte-level
one that is trained here on other domains) by two collections (pieces of text; instructions, whose answers alone count).

The second try, `--gates 400 --collections text-domains`, trains gates for longer, and as a further arm with half of
their tokens from all domains: gates that see their own domain alone learn where their adapter helps within it, not how
that domain differs from others. Its design is in claims/designs.md; rows go to claims/results/phatgoose_400.csv.

`--tune` chooses the rate of adapters, of gates and of the multitask adapter for each base and collection, with `--gates
400` that of the gates of the second try. Gates are tried beside adapters of the paper's rate, by the routed loss.

    python claims/phatgoose.py          3 seeds, about 6 minutes per seed and base; appends to
                                        claims/results/phatgoose.csv and draws claims/results/phatgoose.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from csv import DictReader
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import fmean, stdev

import torch
import transformers
from common.adapters import adapted, held_out, joined, looked_up, mean, mean_inputs, own_share, states
from common.bases import trained_base
from common.documents import BATCH, COLLECTIONS, GENERAL, LENGTH, Base, Blocks, Collection, drawn
from common.rates import UNREPORTED, add_rates, parted, rates_of
from results import RESULTS, append
from torch import Tensor, nn

from moeify.compose import set_gates
from moeify.data import ByteTokenizer
from moeify.data.claim_files import data_file
from moeify.routers import Arrow, Phatgoose, TopK, Uniform
from moeify.train.adapter_gates import train_gates

BASE, ADAPTER, GATE = 800, 60, 100
BASE_RATE, RATE = 2e-3, 5e-3


def stories(seed: int) -> Base:
    folder = data_file("stories260k/hf/model.safetensors").parent
    for file in ("config.json", "tokenizer.json"):
        data_file(f"stories260k/hf/{file}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Base(model, partial(tokenizer.encode, add_special_tokens=False), tokenizer.bos_token_id)


def own(seed: int) -> Base:
    """A model of bytes, trained on domains that no adapter is for."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    base = Base(transformers.LlamaForCausalLM(config), ByteTokenizer().encode, ByteTokenizer.eos_token_id)
    text = [base.blocks(documents) for documents in COLLECTIONS["text-domains"].read("train", GENERAL).values()]
    learn = partial(train, domains=text, steps=BASE, seed=seed, rate=BASE_RATE, batch=2 * BATCH)
    trained_base(base.model, learn, *(part for blocks in text for part in (blocks.ids, blocks.labels)))
    return base


BASES = {"stories260k": stories, "own": own}


def train(model: nn.Module, domains: list[Blocks], steps: int, seed: int, rate: float, batch: int = BATCH) -> nn.Module:
    """AdamW with 6 % of warm-up and a linear decay; returns the model."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.06, anneal_strategy="linear")
    model.train()
    for examples in drawn(domains, steps, seed, batch):
        model(**examples).loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


Rates = dict[str, float]
"""The learning rate of everything that is trained, by the names of `trained`."""


def trained(gate_steps: int) -> tuple[str, ...]:
    """What a try trains and can choose a rate for; the second has the adapters of the first."""
    gates = gates_named(gate_steps)
    return ("adapter", gates, "multitask") if gate_steps == GATE else (gates, gates_named(gate_steps, negatives=True))


def gates_named(steps: int, *, negatives: bool = False) -> str:
    return f"gates{' with negatives' if negatives else ''}, {steps} steps"


@dataclass
class Found:
    """The held-out losses of an arm, and the share of its first choices that are a domain's own adapter."""

    own: dict[str, float] = field(default_factory=dict)
    unseen: dict[str, float] = field(default_factory=dict)
    mixed: dict[str, float] = field(default_factory=dict)
    share: float | None = None


@dataclass(frozen=True)
class Tests:
    """What every arm is asked: blocks by domain, and blocks whose halves are of two domains."""

    own: dict[str, Blocks]
    unseen: dict[str, Blocks]
    mixed: dict[str, Blocks]

    @classmethod
    def of(cls, base: Base, collection: Collection) -> Tests:
        documents = collection.read(collection.test, collection.own + collection.unseen)
        cut = {domain: base.blocks(found) for domain, found in documents.items()}
        own = {domain: cut[domain][: collection.blocks] for domain in collection.own}
        unseen = {domain: cut[domain][: 3 * collection.blocks] for domain in collection.unseen}
        mixed, half = {}, LENGTH // 2
        for a, b in zip(collection.own, collection.own[1:] + collection.own[:1], strict=True):
            rows = slice(collection.blocks // 2)
            first, second = own[a][rows], own[b][rows]
            mixed[f"{a} + {b}"] = Blocks(
                torch.cat([first.ids[:, :half], second.ids[:, half:]], 1),
                torch.cat([first.labels[:, :half], second.labels[:, half:]], 1),
            )
        return cls(own, unseen, mixed)

    def ask(self, model: nn.Module, task: Callable[[Blocks], Tensor] | None = None) -> Found:
        found = [
            {name: held_out(model, blocks, None if task is None else task(blocks)) for name, blocks in group.items()}
            for group in (self.own, self.unseen, self.mixed)
        ]
        return Found(*found)

    def told(self, model: nn.Module, singles: list[Found]) -> Found:
        """The own adapter of every domain, token by token; for a domain that has none, the best in hindsight."""
        found = Found()
        for e, domain in enumerate(self.own):
            found.own[domain] = singles[e].own[domain]
        for domain in self.unseen:
            found.unseen[domain] = min(single.unseen[domain] for single in singles)
        for e, (name, blocks) in enumerate(self.mixed.items()):
            task = torch.full_like(blocks.ids, e)
            task[:, LENGTH // 2 :] = (e + 1) % len(self.own)
            found.mixed[name] = held_out(model, blocks, task)
        found.share = 1.0
        return found


def arms(base: Base, collection: Collection, seed: int, rates: Rates) -> Iterator[tuple[str, Found]]:
    """Every way to answer, and what it makes of the tests."""
    tests = Tests.of(base, collection)
    learnt = [base.blocks(found) for found in collection.read("train", collection.own).values()]
    number = len(learnt)
    yield "base", tests.ask(base.model)

    adapters = [adapter(base, blocks, seed, e, rates["adapter"]) for e, blocks in enumerate(learnt)]
    gates = gates_of(adapters, learnt, GATE, seed, rates[gates_named(GATE)])
    activations = [mean_inputs(one, blocks[:16]) for one, blocks in zip(adapters, learnt, strict=True)]

    together = partial(joined, base.model, adapters)
    lookup = looked_up(together, number)
    singles = [tests.ask(lookup, lambda blocks, e=e: torch.full((len(blocks),), e)) for e in range(number)]
    yield "one adapter, the best on average", min(singles, key=lambda single: fmean(single.own.values()))

    torch.manual_seed(seed)
    routed = together(torch.cat, partial(TopK, k=2))
    yield "random router, k=2", asked(tests, routed)
    yield "merged, mean of A and of B", tests.ask(together(mean, Uniform))
    yield "uniform, 1/E", tests.ask(together(torch.cat, Uniform))

    centres = torch.stack([states(base.model, blocks[:32]).mean(0) for blocks in learnt])

    def nearest(blocks: Blocks) -> Tensor:
        """The domain whose mean state is nearest to the document's, by cosine, after the mean of all is taken off."""
        apart = states(base.model, blocks) - centres.mean(0)
        return nn.functional.cosine_similarity(apart.unsqueeze(1), centres - centres.mean(0), dim=-1).argmax(-1)

    found = tests.ask(lookup, nearest)
    found.share = fmean((nearest(blocks) == e).float().mean().item() for e, blocks in enumerate(tests.own.values()))
    yield "retrieved by mean state", found

    routed = together(torch.cat, partial(Phatgoose, k=2))
    set_gates(routed, activations)
    yield "mean activations, k=2", asked(tests, routed)
    yield "Arrow, k=3", asked(tests, together(torch.cat, Arrow))
    set_gates(routed, gates)
    yield "PHATGOOSE, k=2", asked(tests, routed)
    yield "told the domain", tests.told(lookup, singles)

    yield "multitask, equal tokens", tests.ask(multitask(base, learnt, seed, rates["multitask"]))


def gated(base: Base, collection: Collection, seed: int, rates: Rates, steps: int) -> Iterator[tuple[str, Found]]:
    """The arms of the second try: gates that are trained for so many steps, without and with other domains."""
    tests = Tests.of(base, collection)
    learnt = [base.blocks(found) for found in collection.read("train", collection.own).values()]
    adapters = [adapter(base, blocks, seed, e, rates["adapter"]) for e, blocks in enumerate(learnt)]
    together = partial(joined, base.model, adapters)
    routed = together(torch.cat, partial(Phatgoose, k=2))
    activations = [mean_inputs(one, blocks[:16]) for one, blocks in zip(adapters, learnt, strict=True)]
    set_gates(routed, activations)
    yield "mean activations, k=2", asked(tests, routed)
    for name, negatives in (("PHATGOOSE, k=2", False), ("PHATGOOSE with negatives, k=2", True)):
        rate = rates[gates_named(steps, negatives=negatives)]
        set_gates(routed, gates_of(adapters, learnt, steps, seed, rate, negatives=negatives))
        yield name, asked(tests, routed)
    lookup = looked_up(together, len(learnt))
    singles = [tests.ask(lookup, lambda blocks, e=e: torch.full((len(blocks),), e)) for e in range(len(learnt))]
    yield "told the domain", tests.told(lookup, singles)


def adapter(base: Base, blocks: Blocks, seed: int, e: int, rate: float) -> nn.Module:
    """The base with the adapter of a domain, the e-th."""
    torch.manual_seed(1000 * seed + e)
    return train(adapted(base.model, 1), [blocks], ADAPTER, 1000 * seed + e, rate)


def multitask(base: Base, learnt: list[Blocks], seed: int, rate: float) -> nn.Module:
    """The base with one adapter for all domains."""
    number = len(learnt)
    torch.manual_seed(1000 * seed + number)
    return train(adapted(base.model, 1), learnt, ADAPTER * number, 1000 * seed + number, rate)


def gates_of(
    adapters: list[nn.Module], learnt: list[Blocks], steps: int, seed: int, rate: float, *, negatives: bool = False
) -> list[dict[str, Tensor]]:
    """The gates of every adapter, trained on blocks of its domain; with negatives, half of them are of all domains."""
    gates = []
    for e, (one, blocks) in enumerate(zip(adapters, learnt, strict=True)):
        domains = [blocks] * len(learnt) + learnt if negatives else [blocks]
        gates.append(train_gates(one, drawn(domains, steps, 1000 * seed + 100 + e), steps=steps, lr=rate))
    return gates


def tuned(options: argparse.Namespace) -> dict[tuple[str, str], Rates]:
    """The rates of every base and collection."""

    @cache
    def base_of(name: str) -> Base:
        return BASES[name](UNREPORTED)

    @cache
    def parts(name: str, collection: str) -> tuple[list[Blocks], list[Blocks]]:
        """Of every own domain what is held out, as many blocks as of a test, and what is learnt."""
        found, base = COLLECTIONS[collection], base_of(name)
        learnt = [base.blocks(documents) for documents in found.read("train", found.own).values()]
        rest, most = ([blocks[parted(len(blocks))[i]] for blocks in learnt] for i in range(2))
        return [blocks[: found.blocks] for blocks in rest], most

    @cache
    def adapters(name: str, collection: str, rate: float) -> list[nn.Module]:
        most = parts(name, collection)[1]
        return [adapter(base_of(name), blocks, UNREPORTED, e, rate) for e, blocks in enumerate(most)]

    def error(arm: tuple[str, str, str], rate: float) -> float:
        what, name, collection = arm
        rest, most = parts(name, collection)
        if what == "multitask":
            model = multitask(base_of(name), most, UNREPORTED, rate)
        elif what == "adapter":
            found = zip(adapters(name, collection, rate), rest, strict=True)
            return fmean(held_out(one, blocks) for one, blocks in found)
        else:
            ready = adapters(name, collection, RATE)
            model = joined(base_of(name).model, ready, torch.cat, partial(Phatgoose, k=2))
            steps, negatives = options.gates, what == gates_named(options.gates, negatives=True)
            set_gates(model, gates_of(ready, most, steps, UNREPORTED, rate, negatives=negatives))
        return fmean(held_out(model, blocks) for blocks in rest)

    settings = [(name, collection) for name in options.bases for collection in options.collections]
    parts_trained = trained(options.gates)
    if not options.tune:
        parts_trained = tuple(dict.fromkeys(trained(GATE) + parts_trained))
    rates = rates_of("phatgoose", [(what, *setting) for setting in settings for what in parts_trained], options, error)
    return {setting: {what: rates[what, *setting] for what in parts_trained} for setting in settings}


def asked(tests: Tests, model: nn.Module) -> Found:
    found = tests.ask(model)
    found.share = own_share(model, list(tests.own.values()))
    return found


def draw() -> None:
    """What every arm gains over the base, mean over the seeds, in their last run."""
    from matplotlib.figure import Figure

    columns = ("base", "collection", "arm", "seed")
    with (RESULTS / "phatgoose.csv").open(newline="") as lines:
        rows = list({tuple(row[column] for column in columns): row for row in DictReader(lines)}.values())
    settings = list(dict.fromkeys((row["base"], row["collection"]) for row in rows))
    figure = Figure(figsize=(11, 3.6 * -(-len(settings) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(settings) // 2), 2, squeeze=False).flatten()
    for axis, setting in zip(axes, settings, strict=False):
        here = [row for row in rows if (row["base"], row["collection"]) == setting]
        start = {row["seed"]: row for row in here if row["arm"] == "base"}
        names = [arm for arm in dict.fromkeys(row["arm"] for row in here) if arm != "base"]
        for shift, column in zip((0.27, 0, -0.27), ("loss_own", "loss_unseen", "loss_mixed"), strict=True):
            gains = [
                [float(start[row["seed"]][column]) - float(row[column]) for row in here if row["arm"] == name]
                for name in names
            ]
            places = [-place + shift for place in range(len(names))]
            axis.barh(places, [fmean(gain) for gain in gains], 0.27, label=column.removeprefix("loss_"))
        axis.set_yticks([-place for place in range(len(names))], names, fontsize=8)
        axis.set(title=", ".join(setting), xlabel="nats per token better than the base")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.legend(fontsize=8)
    figure.savefig(RESULTS / "phatgoose.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--collections", nargs="+", default=list(COLLECTIONS), choices=list(COLLECTIONS))
    parser.add_argument(
        "--gates", type=int, default=GATE, help="steps of the gates; other than 100 they are those of the second try"
    )
    add_rates(parser, RATE)
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    parser.set_defaults(steps=ADAPTER)
    options = parser.parse_args()
    is_first = options.gates == GATE
    ways = arms if is_first else partial(gated, steps=options.gates)
    torch.set_num_threads(1)
    rates = tuned(options)
    ends: dict[tuple[str, str, str], list[tuple[float, ...]]] = {}
    for seed in options.seeds:
        for name in options.bases:
            base = BASES[name](seed)
            for collection in options.collections:
                began, own = time.process_time(), rates[name, collection]
                for arm, found in ways(base, COLLECTIONS[collection], seed, own):
                    groups = (found.own, found.unseen, found.mixed)
                    means = tuple(fmean(group.values()) for group in groups)
                    ends.setdefault((name, collection, arm), []).append(means)
                    share = "" if found.share is None else f"{found.share:.3f}"
                    append("phatgoose" if is_first else f"phatgoose_{options.gates}", {
                        "base": name, "collection": collection, "arm": arm, "seed": seed,
                        "adapter_steps": ADAPTER, "tokens_per_adapter": ADAPTER * BATCH * LENGTH,
                        "loss_own": f"{means[0]:.4f}", "loss_unseen": f"{means[1]:.4f}",
                        "loss_mixed": f"{means[2]:.4f}",
                        "own_expert_first": share,
                        "by_domain": "; ".join(f"{d} {loss:.4f}" for group in groups for d, loss in group.items()),
                        "hardware": options.hardware, "rates": "; ".join(f"{what} {own[what]:g}" for what in own),
                        "cpu_seconds": f"{time.process_time() - began:.0f}",
                    })  # fmt: skip
                    told = "  ".join(f"{m:.4f}" for m in means)
                    print(f"{name}, {collection}, seed {seed}  {arm:34} {told}  {share}", flush=True)
    for (name, collection, arm), values in ends.items():
        told = "  ".join(
            f"{fmean(column):.4f}" + (f" ± {stdev(column):.4f}" if len(column) > 1 else "")
            for column in zip(*values, strict=True)
        )
        print(f"{name}, {collection}, {arm:34} {told}")
    if is_first:
        draw()


if __name__ == "__main__":
    main()
