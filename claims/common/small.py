"""A small byte-level Llama, the text that came with Python and torch, and arms that are trained on it in turn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from common.rates import UNREPORTED, add_rates, rates_of
from common.training import Balancing, balanced, drawn, held_out, train
from torch import Tensor, nn

from moeify.data import ByteTokenizer, blocks
from moeify.data.blocks import Blocks
from moeify.data.corpus import build_corpus
from moeify.flops import count

LENGTH, BATCH, WIDTH, HIDDEN, HELD_OUT = 128, 8, 64, 128, 192
Arm = TypeVar("Arm", bound=Hashable)


@dataclass(frozen=True)
class Data:
    """Blocks of token ids, each (blocks, length).

    Attributes:
        learnt: what a model is trained on.
        unseen: held out, and reported.
        choosing: held out too, and not reported: what rates are chosen by.
        corpus: the start of the hash of the text that came with Python and torch, which differs between environments.
    """

    learnt: Tensor
    unseen: Tensor
    choosing: Tensor
    corpus: str = ""


def text() -> Data:
    """The text that came with Python and torch, of all domains alike."""
    corpus = build_corpus(300_000)
    learnt, held = blocks(corpus, ByteTokenizer(), LENGTH)
    return divided(learnt, held, corpus.sha256[:12])


def divided(learnt: Blocks, held: Blocks, corpus: str = "") -> Data:
    """Blocks to learn from, and of those that are held out 192 to be reported and 192 to choose by, at random."""
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    unseen, choosing = (held.input_ids[part].long() for part in order[: 2 * HELD_OUT].split(HELD_OUT))
    return Data(learnt.input_ids.long(), unseen, choosing, corpus)


def llama(hidden: int = HIDDEN, *, width: int = WIDTH) -> nn.Module:
    """Two layers, of width 64 by default, from scratch."""
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=width, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def parser(description: str | None, steps: int | None = 250, rate: float = 1e-3) -> argparse.ArgumentParser:
    """Of a command line with steps, rates, seeds and hardware."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--steps", type=int, default=steps)
    add_rates(found, rate)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    return found


def options(description: str | None, steps: int = 250, rate: float = 1e-3) -> argparse.Namespace:
    """Steps, rates, seeds and hardware from the command line."""
    return parser(description, steps, rate).parse_args()


def trained(
    claim: str,
    column: str,
    arms: Mapping[Arm, Callable[[], nn.Module]],
    chosen: argparse.Namespace,
    *,
    balancing: Mapping[Arm, Balancing] | None = None,
    prepare: Callable[[nn.Module, int], None] = lambda model, step: None,
    measure: Callable[[nn.Module, Tensor], Mapping[str, str]] | None = None,
    data: Data | None = None,
    batch: int = BATCH,
) -> tuple[dict[Arm, list[float]], list[dict[str, Any]]]:
    """Train every arm from every seed on the same blocks, on one thread, each at its own rate.

    Args:
        claim: whose arms they are.
        column: what the arms are called in the rows.
        arms: how each model is built.
        chosen: what `options` returned.
        balancing: the loss of the decisions of arms that have another one than `balanced`.
        prepare: called before every step with the model and the number of the step.
        measure: further columns of a row, of the trained model and the held-out blocks.
        data: `text` by default.
        batch: blocks of a step.

    Returns:
        Of each arm the held-out losses by seed, in nats per byte; and a row for every run.
    """
    torch.set_num_threads(1)
    data = data or text()

    def run(arm: Arm, seed: int, rate: float) -> nn.Module:
        torch.manual_seed(seed)
        return train(
            arms[arm](), drawn(data.learnt, batch=batch), chosen.steps, seed, rate,
            balancing=(balancing or {}).get(arm, balanced), prepare=prepare,
        )  # fmt: skip

    rates = rates_of(
        claim, arms, chosen, lambda arm, rate: held_out(run(arm, UNREPORTED, rate), data.choosing), corpus=data.corpus
    )
    losses: dict[Arm, list[float]] = {arm: [] for arm in arms}
    rows = []
    for seed in chosen.seeds:
        for arm, rate in rates.items():
            began = time.process_time()
            model = run(arm, seed, rate)
            losses[arm].append(held_out(model, data.unseen))
            counted = count(model)
            rows.append({
                "hardware": chosen.hardware, column: arm, "seed": seed, "steps": chosen.steps,
                "tokens": chosen.steps * batch * LENGTH, "rate": rate, "loss": f"{losses[arm][-1]:.4f}",
                "parameters": counted.parameters, "flops": counted.flops,
                **(measure(model, data.unseen) if measure else {}),
                "cpu_seconds": f"{time.process_time() - began:.0f}", "corpus": data.corpus,
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    return losses, rows
