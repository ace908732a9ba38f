"""A small byte-level Llama, the text that came with Python and torch, and arms that are trained on it in turn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from common.training import Balancing, balanced, drawn, held_out, train
from torch import Tensor, nn

from moeify.data import ByteTokenizer, blocks
from moeify.data.corpus import build_corpus
from moeify.flops import count

LENGTH, BATCH, WIDTH, HIDDEN = 128, 8, 64, 128
Arm = TypeVar("Arm", bound=Hashable)


def text() -> tuple[Tensor, Tensor]:
    """Blocks of token ids to learn from and 192 that are held out, each (blocks, LENGTH), of all domains alike."""
    learnt, held = blocks(build_corpus(300_000), ByteTokenizer(), LENGTH)
    dice = torch.Generator().manual_seed(0)
    return learnt.input_ids.long(), held.input_ids[torch.randperm(len(held), generator=dice)[:192]].long()


def llama(hidden: int = HIDDEN, *, width: int = WIDTH) -> nn.Module:
    """Two layers, of width 64 by default, from scratch."""
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=width, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def parser(description: str | None, steps: int | None = 250, rate: float = 1e-3) -> argparse.ArgumentParser:
    """Of a command line with steps, rate, seeds and hardware."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--steps", type=int, default=steps)
    found.add_argument("--rate", type=float, default=rate)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    return found


def options(description: str | None, steps: int = 250, rate: float = 1e-3) -> argparse.Namespace:
    """Steps, rate, seeds and hardware from the command line."""
    return parser(description, steps, rate).parse_args()


def trained(
    column: str,
    arms: Mapping[Arm, Callable[[], nn.Module]],
    chosen: argparse.Namespace,
    *,
    balancing: Mapping[Arm, Balancing] | None = None,
    measure: Callable[[nn.Module, Tensor], Mapping[str, str]] | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    batch: int = BATCH,
) -> tuple[dict[Arm, list[float]], list[dict[str, Any]]]:
    """Train every arm from every seed on the same blocks, on one thread.

    Args:
        column: what the arms are called in the rows.
        arms: how each model is built.
        chosen: what `options` returned.
        balancing: the loss of the decisions of arms that have another one than `balanced`.
        measure: further columns of a row, of the trained model and the held-out blocks.
        data: blocks to learn from and held-out ones, `text` by default.
        batch: blocks of a step.

    Returns:
        Of each arm the held-out losses by seed, in nats per byte; and a row for every run.
    """
    torch.set_num_threads(1)
    learnt, unseen = data or text()
    losses: dict[Arm, list[float]] = {arm: [] for arm in arms}
    rows = []
    for seed in chosen.seeds:
        for arm, build in arms.items():
            torch.manual_seed(seed)
            began = time.process_time()
            model = train(
                build(), drawn(learnt, batch=batch), chosen.steps, seed, chosen.rate,
                balancing=(balancing or {}).get(arm, balanced),
            )  # fmt: skip
            losses[arm].append(held_out(model, unseen))
            counted = count(model)
            rows.append({
                "hardware": chosen.hardware, column: arm, "seed": seed, "steps": chosen.steps,
                "tokens": chosen.steps * batch * LENGTH, "rate": chosen.rate, "loss": f"{losses[arm][-1]:.4f}",
                "parameters": counted.parameters, "flops": counted.flops,
                **(measure(model, unseen) if measure else {}), "cpu_seconds": f"{time.process_time() - began:.0f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    return losses, rows
