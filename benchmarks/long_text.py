"""Train and measure a small sparse language model on rows of 4,096 to 16,384 tokens, beside its dense twin.

Rows are packed with the text that came with Python and torch, in documents of 500 to 16,000 bytes that do not see each
other. Three things are measured. `layer`: the memory of a forward and a backward pass of one sparse layer, and of a
dense network of its active size, in which attention has no part; it should double with the tokens. `step`: memory and
CPU seconds of a training step of the whole model, without activation checkpointing. Both are processes of their own:
what was resident at most less what was resident before. `position`: both models learn rows of the first length, and are
then measured on held-out rows of every length, by a token's position in its document (`packed`), and in the row if
nothing tells of documents (`one`). Linux only.

    python benchmarks/long_text.py
    python benchmarks/long_text.py --lengths 256 512 --steps 2 --rounds 1 --out /tmp/long-text.csv
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from measure import HEAD, in_turn, parser, report, start, summary
from peak import resident
from torch import Tensor, nn

from moeify import MoE, Recipe, losses, record, sparsify
from moeify.data import ByteTokenizer, Packed, packed
from moeify.data.corpus import build_corpus
from moeify.evaluate.positions import by_position
from moeify.experts import FFN
from moeify.routers import TopK
from moeify.sparsify import fresh

WIDTH, HIDDEN, EXPERTS, K, LAYERS = 64, 128, 8, 2, 2
SHORTEST, LONGEST = 500, 16_000  # bytes of a document
RATE, BALANCE = 2e-3, 1e-2
EDGES = (0, 256, 1024, 2048, 4096, 8192)  # where the ranges of positions begin
FIELDS = [
    *HEAD, "what", "model", "tokens", "documents", "peak_mib", "quartiles_mib", "cpu_s", "steps", "first", "last",
    "predicted", "loss", "max_violation", "elsewhere",
]  # fmt: skip


def llama(kind: str, length: int) -> nn.Module:
    """A Llama from scratch whose dense networks have the active size of the sparse layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=WIDTH, intermediate_size=K * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=length, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config)
    if kind == "dense":
        return dense
    return sparsify(dense, Recipe(num_experts=EXPERTS, experts=partial(fresh, hidden=HIDDEN)), verbose=False)


def layer(kind: str) -> nn.Module:
    """A feed-forward network alone."""
    if kind == "sparse":
        return MoE(TopK(WIDTH, EXPERTS, k=K), FFN(EXPERTS, WIDTH, HIDDEN))
    return llama("dense", 8).get_submodule("model.layers.0.mlp")


def documents(part: str) -> Iterator[str]:
    """Paragraphs of the corpus, joined to documents whose sizes are spread evenly by their logarithm, at random."""
    corpus, dice = build_corpus(300_000), random.Random(0)
    for text in {"train": corpus.train, "validation": corpus.validation}[part].values():
        document, size = "", drawn(dice)
        for paragraph in text.decode().split("\n\n"):
            document += paragraph + "\n\n"
            if len(document) >= size:
                yield document
                document, size = "", drawn(dice)


def drawn(dice: random.Random) -> float:
    """The bytes that the next document has at least."""
    return SHORTEST * (LONGEST / SHORTEST) ** dice.random()


def rows(part: str, length: int) -> Packed:
    """Packed rows."""
    return packed(documents(part), ByteTokenizer(), length)


def fullest(length: int) -> dict[str, Tensor]:
    """The held-out row of the most documents."""
    return max(rows("validation", length), key=documents_of)


def documents_of(row: dict[str, Tensor]) -> int:
    """How many documents a row has."""
    return int((row["position_ids"] == 0).sum())


def step(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """The loss of a row of packed documents, with that of balance."""
    inputs = {name: value.unsqueeze(0) for name, value in row.items()}
    if isinstance(model.get_submodule("model.layers.0.mlp"), MoE):
        with record(model) as decisions:
            task = model(**inputs).loss
        return task + BALANCE * torch.stack([losses.balance(routing) for routing in decisions.values()]).mean()
    return model(**inputs).loss


def used(what: str, kind: str, length: int, threads: int) -> tuple[float, float]:
    """Peak MiB of a pass or step beside what was there before, and its CPU seconds; to be called in a fresh process."""
    torch.set_num_threads(threads)
    if what == "layer":
        model = layer(kind)
        work = partial(passed, model)
        small, large = torch.randn(1, 64, WIDTH), torch.randn(1, length, WIDTH)
    else:
        model = llama(kind, length)
        work = partial(stepped, model)
        small, large = fullest(64), fullest(length)
    work(small)  # so that the code of libraries does not count
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark falls to what is resident now
    before, began = resident("VmRSS"), time.process_time()
    work(large)
    return resident("VmHWM") - before, time.process_time() - began


def passed(module: nn.Module, x: Tensor) -> None:
    """Forward and backward through a layer."""
    module(x.requires_grad_()).sum().backward()


def stepped(model: nn.Module, row: dict[str, Tensor]) -> None:
    """Forward and backward through a model."""
    step(model, row).backward()


def trained(kind: str, length: int, longest: int, steps: int) -> nn.Module:
    """A model that has learnt so many rows."""
    model, learnt = llama(kind, longest), rows("train", length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05, anneal_strategy="linear")
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(0)).tolist()
    for number in range(steps):
        stepped(model, learnt[order[number % len(order)]])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def position_rows(model: nn.Module, length: int, held: int) -> Iterator[dict[str, str]]:
    """What was measured in each range of positions of held-out rows: as packed, and as one text each."""
    samples = [rows("validation", length)[i] for i in range(max(1, held // length))]
    whole = [{name: value for name, value in row.items() if name != "position_ids"} for row in samples]
    ways: dict[str, list[dict[str, Tensor]]] = {"packed": samples, "one": whole}
    for packing, given in ways.items():
        for found in by_position(model, given, [edge for edge in EDGES if edge < length]):
            if found.tokens:
                yield {
                    "documents": packing, "first": str(found.first), "last": str(found.last),
                    "predicted": str(found.tokens), "loss": f"{found.loss:.4f}",
                    "max_violation": f"{max(found.max_violation.values()):.3f}" if found.rows else "",
                    "elsewhere": f"{max(found.elsewhere.values()):.3f}" if found.rows else "",
                }  # fmt: skip


def main() -> None:
    options = parser(__doc__, rounds=3, file="long-text-cpu.csv")
    options.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    options.add_argument("--steps", type=int, default=120)
    options.add_argument(
        "--held", type=int, default=32_768, help="tokens that are measured by position, at each length"
    )
    options.add_argument("--what", nargs="+", default=["layer", "step", "position"])
    chosen = options.parse_args()
    begin = start(chosen)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")  # forks off a process that has loaded all and run nothing
    context.set_forkserver_preload(["long_text"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for what in [what for what in ("layer", "step") if what in chosen.what]:
            for length in chosen.lengths:
                seconds: dict[str, list[float]] = {"dense": [], "sparse": []}

                def measured(kind: str, turn: int, what: str = what, length: int = length, into=seconds) -> float:
                    peak, cpu = pool.apply(used, (what, kind, length, chosen.threads))
                    into[kind].append(cpu)
                    return peak

                ways: dict[str, Callable[[int], float]] = {kind: partial(measured, kind) for kind in seconds}
                peaks = in_turn(ways, chosen.rounds)
                report(chosen.out, FIELDS, [
                    begin | {"what": what, "model": kind, "tokens": str(length)}
                    | ({"documents": str(documents_of(fullest(length)))} if what == "step" else {})
                    | summary(("peak_mib", "quartiles_mib"), values) | {"cpu_s": f"{median(seconds[kind]):.3f}"}
                    for kind, values in peaks.items()
                ])  # fmt: skip
    for kind in ("dense", "sparse") if "position" in chosen.what else ():
        began = time.process_time()
        model = trained(kind, chosen.lengths[0], max(chosen.lengths), chosen.steps)
        each = (time.process_time() - began) / chosen.steps
        for length in chosen.lengths:
            common = {"what": "position", "model": kind, "tokens": str(length), "steps": str(chosen.steps)}
            report(chosen.out, FIELDS, [
                begin | common | {"cpu_s": f"{each:.3f}"} | row for row in position_rows(model, length, chosen.held)
            ])  # fmt: skip


if __name__ == "__main__":
    main()
