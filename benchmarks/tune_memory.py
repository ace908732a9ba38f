"""Measure the memory of fine-tuning an MoE model of transformers: whole, by ESFT, and by LoRA on the experts of ESFT.

A Qwen3-MoE of random weights, 8 layers of 64 experts by default, takes three steps of AdamW on 512 tokens. Every way is
a process of its own: what was resident at most, as the system counts it, less what was resident before the model was
read; and the numbers that have gradients and optimizer states. The experts of ESFT are those that `choose` takes at
the threshold, as on a user's data; the ids are drawn from few, as data of one kind are. Linux only.

    python benchmarks/tune_memory.py
    python benchmarks/tune_memory.py --layers 1 --experts 8 --width 32 --hidden 16 --rounds 1 --out /tmp/tune.csv
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from functools import partial
from pathlib import Path

import torch
import transformers
from measure import HEAD, in_turn, parser, ratios, report, start, summary
from peak import resident
from torch import nn

from moeify.train import expert_relevance, lora_experts, train_experts

WAYS = ("whole", "ESFT", "LoRA of all experts", "LoRA of ESFT's experts")
TOKENS, STEPS, RANK, WORDS = 512, 3, 8, 64
FIELDS = [
    *HEAD, "model", "weights_mib", "tokens", "steps", "threshold", "way", "experts_trained", "numbers_trained",
    "peak_mib", "quartiles_mib", "times_whole", "times_whole_quartiles",
]  # fmt: skip


def model(sizes: argparse.Namespace) -> nn.Module:
    """The model, in fp32."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024, hidden_size=sizes.width, intermediate_size=sizes.hidden, moe_intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=8, num_key_value_heads=8, head_dim=sizes.width // 8,
        num_experts=sizes.experts, num_experts_per_tok=min(8, sizes.experts), norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    return transformers.Qwen3MoeForCausalLM(config)


def tuned(sizes: argparse.Namespace, way: str) -> tuple[float, int, int]:
    """Peak MiB, experts and numbers that are trained; to be called in a fresh process."""
    torch.set_num_threads(sizes.threads)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark falls to what is resident now
    before = resident("VmRSS")
    tuning: nn.Module = model(sizes)
    ids = torch.randint(WORDS, (1, TOKENS))
    experts = sizes.experts * sizes.layers
    if way in ("ESFT", "LoRA of ESFT's experts"):
        chosen = expert_relevance(tuning, [{"input_ids": ids}]).choose(sizes.threshold)
        experts = sum(map(len, chosen.values()))
        if way == "ESFT":
            train_experts(tuning, chosen, verbose=False)
        else:
            tuning = lora_experts(tuning, chosen, rank=RANK, alpha=2 * RANK)
    elif way == "LoRA of all experts":
        names = {f"model.layers.{i}.mlp": range(sizes.experts) for i in range(sizes.layers)}
        tuning = lora_experts(tuning, names, rank=RANK, alpha=2 * RANK)
    learning = [p for p in tuning.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    for _ in range(STEPS):
        tuning(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident("VmHWM") - before, experts, sum(p.numel() for p in learning)


def main() -> None:
    options = parser(__doc__, rounds=3, file="tune-memory-cpu.csv")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--threshold", type=float, default=0.2, help="ESFT's p")
    chosen = options.parse_args()
    weights = sum(p.numel() for p in model(chosen).parameters()) * 4 / 2**20
    what = {
        "model": f"Qwen3-MoE, {chosen.layers} layers of {chosen.experts} experts {chosen.width} x {chosen.hidden}",
        "weights_mib": f"{weights:.4g}", "tokens": str(TOKENS), "steps": str(STEPS), "threshold": str(chosen.threshold),
    }  # fmt: skip
    begin = start(chosen) | what
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")  # forks off a process that has loaded all and run nothing
    context.set_forkserver_preload(["tune_memory"])
    trained: dict[str, dict[str, str]] = {}
    with context.Pool(1, maxtasksperchild=1) as pool:

        def measured(way: str, turn: int) -> float:
            found, experts, numbers = pool.apply(tuned, (chosen, way))
            trained[way] = {"experts_trained": str(experts), "numbers_trained": str(numbers)}
            return found

        peaks = in_turn({way: partial(measured, way) for way in WAYS}, chosen.rounds)
    rows = [
        begin
        | {"way": way}
        | trained[way]
        | summary(("peak_mib", "quartiles_mib"), values)
        | summary(("times_whole", "times_whole_quartiles"), ratios(values, peaks["whole"]), ".3f")
        for way, values in peaks.items()
    ]
    report(chosen.out, FIELDS, rows)


if __name__ == "__main__":
    main()
