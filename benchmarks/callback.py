"""Time training steps of transformers' own Trainer with and without `RoutingCallback`, in pairs.

Two small language models learn from 1,024 tokens a step, in two micro-batches, and log every step, the most that a
callback can have to do: a Mixtral with 8 experts of which a token uses 2, and an OLMoE with 64 of which it uses 8. Both
ways of a round train the same model for a few steps, of which the first is left out; their ratio is taken round by
round, of wall time and of the CPU time of the process, which does not count waiting for other processes. A model takes
about two minutes of CPU time.

    python benchmarks/callback.py
    python benchmarks/callback.py --models mixtral --rounds 2 --out /tmp/callback.csv
"""

from __future__ import annotations

import tempfile
import time
from statistics import median

import torch
import transformers
from measure import HEAD, in_turn, parser, points, ratios, report, start, summary
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from moeify.train import RoutingCallback

SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SHAPE, intermediate_size=896, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": transformers.OlmoeConfig(**SHAPE, intermediate_size=224, num_experts=64, num_experts_per_tok=8),
}
SEQUENCES, LENGTH, PARTS, STEPS = 8, 128, 2, 4
WAYS = ("without", "with")
FIELDS = [
    *HEAD, "model", "tokens", "without_ms", "without_quartiles_ms", "with_ms", "with_quartiles_ms",
    "wall_ratio", "wall_ratio_quartiles", "cpu_ratio", "cpu_ratio_quartiles",
]  # fmt: skip


class Clock(TrainerCallback):
    """Wall and CPU milliseconds from the beginning of a step to that of the next, its log entry included."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, float]] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.begun.append((1000 * time.perf_counter(), 1000 * time.process_time()))

    @property
    def step(self) -> tuple[float, float]:
        """The median of all but the first step, which warms up."""
        between = list(zip(self.begun[1:-1], self.begun[2:], strict=True))
        wall, cpu = (median(after[i] - before[i] for before, after in between) for i in range(2))
        return wall, cpu


def train(model: nn.Module, watched: bool) -> tuple[float, float]:
    """Wall and CPU milliseconds of a step."""
    clock, ids = Clock(), torch.randint(8192, (SEQUENCES * (STEPS + 2), LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS + 2, per_device_train_batch_size=SEQUENCES // PARTS, learning_rate=1e-6,
            gradient_accumulation_steps=PARTS, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, log_level="error",
        )  # fmt: skip
        callbacks = [clock, *([RoutingCallback()] if watched else [])]
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.step


def measured(name: str, rounds: int) -> dict[str, str]:
    """The row of a model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    steps: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}

    def way(name: str) -> float:
        steps[name].append(train(model, name == "with"))
        return 0.0

    train(model, watched=True)  # warms up
    in_turn({name: lambda turn, name=name: way(name) for name in WAYS}, rounds)
    wall, cpu = ({name: [step[i] for step in steps[name]] for name in WAYS} for i in range(2))
    row = {"model": name, "tokens": str(SEQUENCES * LENGTH)}
    for name in WAYS:
        row |= summary((f"{name}_ms", f"{name}_quartiles_ms"), wall[name])
    for kind, times in (("wall", wall), ("cpu", cpu)):
        row |= summary((f"{kind}_ratio", f"{kind}_ratio_quartiles"), ratios(times["with"], times["without"]), ".4f")
    return row


def main() -> None:
    options = parser(__doc__, rounds=10, file="callback-cpu.csv")
    options.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    chosen = options.parse_args()
    begin = start(chosen)
    for what in points(chosen, begin, [{"model": name} for name in chosen.models]):
        report(chosen.out, FIELDS, [begin | measured(what["model"], chosen.rounds)])


if __name__ == "__main__":
    main()
