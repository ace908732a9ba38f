"""Time whole models token by token on a CPU: transformers, moeify with 16, 8 and 4 bits, and llama.cpp.

The models have random weights: a Mixtral of 973 M parameters, of which a token reads 279 M; a dense model of equal
total size; one of equal active size; and one as much larger than the active part as Llama 2 70B is than Mixtral's.
In every round all implementations run in turn (A B C A B C ...); a row holds the median and quartiles over rounds. The
share of the bandwidth limit is (bytes of the weights that a token reads) x (tokens per second) over what a plain sum
reads per second in the same rounds. benchmarks/README.md says how to get the tools of llama.cpp.

    python benchmarks/decode.py --llama build/bin
    python benchmarks/decode.py --models sparse --rounds 1 --out /tmp/decode.csv          without llama.cpp
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from allowance import ALLOWANCE, torch_rate
from llama_build import why_not
from measure import HEAD, in_turn, milliseconds, parser, points, quartiles, ratios, report, start, summary
from torch import nn
from transformers import DynamicCache

from moeify.flops import count
from moeify.kernels.cpu.huge_pages import into_huge_pages
from moeify.serve import fast_decode
from moeify.serve.decode import cache_name

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
LARGER = SHAPE | {
    "hidden_size": 2048, "num_hidden_layers": 25, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
MODELS = {
    "sparse": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SHAPE, intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2)
    ),
    "dense-total": lambda: _llama(SHAPE, 8 * 3584),
    "dense-active": lambda: _llama(SHAPE, 2 * 3584),
    "dense-larger": lambda: _llama(LARGER, 7680),
}
BITS = {"bf16": 16, "q8_0": 8, "q4_0": 4}
FIELDS = [
    *HEAD, "model", "implementation", "bits", "what", "tok_per_s", "quartiles", "share_of_bandwidth", "over_llama.cpp",
    "bandwidth_gb_per_s",
]  # fmt: skip
PROMPT, GENERATED, SOME = 512, 64, 8

Task = tuple[str, int, str]
"""An implementation, bits, and what is done."""
Way = Callable[[int], float]
"""What is measured in the round of that number: tokens per second."""
Times = dict[Task, list[float]]
"""Tokens per second of every round."""


def _llama(shape: dict[str, Any], hidden: int) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=hidden))


def skeleton(name: str) -> nn.Module:
    """One of the models, without weights."""
    with torch.device("meta"):
        return MODELS[name]()


def build(name: str) -> nn.Module:
    """One of the models, in bf16, with small random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = skeleton(name).to_empty(device="cpu").eval()
        for parameter in model.parameters():
            parameter.data.uniform_(-0.03, 0.03) if parameter.dim() > 1 else parameter.data.fill_(1)
    finally:
        torch.set_default_dtype(torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers were empty too
    model.generation_config.eos_token_id = None
    return model


def twin(model: nn.Module, bits: int) -> nn.Module:
    """A model with the same parameters, in the same memory where they are not quantised, that decodes fast."""
    return fast_decode(copy.deepcopy(model, {id(p): p for p in model.parameters()}), bits=bits)


@torch.no_grad()
def decode(model: nn.Module, batch: int, tokens: int = GENERATED, prompt: int = 2) -> float:
    """Tokens per second of all sequences, behind short prompts that differ."""
    state = {cache_name(model): DynamicCache()}
    ids = torch.arange(prompt * batch).view(batch, prompt) + 100
    ids = model(ids, **state, use_cache=True).logits[:, -1:].argmax(-1)
    ids = model(ids, **state, use_cache=True).logits.argmax(-1)
    begun = time.perf_counter()
    for _ in range(tokens):
        ids = model(ids, **state, use_cache=True).logits.argmax(-1)
    return batch * tokens / (time.perf_counter() - begun)


@torch.no_grad()
def prefill(model: nn.Module) -> float:
    """Tokens per second of a prompt, up to the logits of its last token."""
    ids = torch.arange(PROMPT).unsqueeze(0) * 61 % SHAPE["vocab_size"]
    begun = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return PROMPT / (time.perf_counter() - begun)


def generate(model: nn.Module) -> float:
    """Tokens per second through `model.generate`, its own work included."""
    ids = torch.arange(2).view(1, 2) + 100
    begun = time.perf_counter()
    model.generate(ids, max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    return GENERATED / (time.perf_counter() - begun)


def llama(tools: Path, file: Path, threads: int, what: str) -> float:
    """Tokens per second as llama-bench says, one repetition behind a warm-up."""
    prompt, generated = (PROMPT, 0) if what == "prefill" else (0, GENERATED)
    command = [tools / "llama-bench", "-m", file, "-t", threads, "-p", prompt, "-n", generated, "-r", 1, "-o", "json"]
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
    return float(json.loads(said)[0]["avg_ts"])


class Bandwidth:
    """GB per second that a sum reads of memory that lies as the weights do, at best of three."""

    def __init__(self) -> None:
        self.memory = nn.Embedding(200_000, 1000)
        into_huge_pages([self.memory])

    def __call__(self, turn: int = 0) -> float:
        weight = self.memory.weight.detach()
        return weight.nbytes / 1e6 / min(milliseconds(weight.sum) for _ in range(3))


def bytes_per_step(model: nn.Module, bits: int, chosen: float | None = None) -> float:
    """Of the weights that a step reads, without the embedding; 4 bits have scales beside, the head keeps 8.

    Args:
        model: one of the models.
        bits: of its weights.
        chosen: experts of a layer that some sequence chooses; those that one token chooses, if not given.
    """
    config = model.config
    body = sum(p.numel() for name, p in model.model.layers.named_parameters() if "experts" not in name)
    experts = sum(p.numel() for name, p in model.model.layers.named_parameters() if "experts" in name)
    if experts:
        body += experts * (chosen or config.num_experts_per_tok) / config.num_local_experts
    return body * {16: 2, 8: 1, 4: 0.5625}[bits] + model.lm_head.weight.numel() * {16: 2, 8: 1, 4: 1}[bits]


def ways(name: str, model: nn.Module, batches: list[int]) -> tuple[dict[Task, Way], dict[Task, str]]:
    """What is timed in this process, warmed up; and the reasons why something of transformers is left out."""
    best = "eager"
    if name == "sparse":
        found = {}
        for implementation in ("eager", "grouped_mm"):
            model.set_experts_implementation(implementation)
            found[implementation] = max(decode(model, 1, 4) for _ in range(2))
        best = max(found, key=found.__getitem__)
        model.set_experts_implementation(best)
    tasks: dict[Task, Way] = {}
    left_out: dict[Task, str] = {}
    contenders = [(f"transformers/{best}" if name == "sparse" else "transformers", 16, model)]
    contenders += [("moeify", bits, twin(model, bits)) for bits in (BITS.values() if name == "sparse" else [16])]
    for implementation, bits, contender in contenders:
        speeds: dict[str, tuple[int, Callable[[nn.Module], float]]] = {"decode": (0, lambda c: decode(c, 1))}
        speeds["prefill"] = 2 * PROMPT, prefill
        if bits == 16 and name in ("sparse", "dense-total"):
            for batch in batches:
                speeds[f"decode, batch {batch}"] = (2 + 1 + SOME) * batch, partial(decode, batch=batch, tokens=SOME)
        if implementation == "moeify":
            speeds["generate"] = 0, generate
        decode(contender, 1, 2)
        for what, (tokens, speed) in speeds.items():
            reason = None
            if implementation != "moeify":
                reason = ALLOWANCE.refuse(tokens * count(model).flops, torch_rate(torch.bfloat16), 1)
            if reason:
                left_out[implementation, bits, what] = reason
                continue
            if what == "prefill":
                prefill(contender)
            tasks[implementation, bits, what] = lambda turn, c=contender, s=speed: s(c)
    return tasks, left_out


def llamas(name: str, model: nn.Module, options: argparse.Namespace, folder: Path) -> dict[Task, Way]:
    """What llama.cpp is timed with: files of the same weights, the sparse model's also of 8 and 4 bits."""
    from gguf_models import write

    files = {"bf16": folder / f"{name}-bf16.gguf"}
    write(model, files["bf16"])
    for kind in ("q8_0", "q4_0") if name == "sparse" else ():
        files[kind] = folder / f"{name}-{kind}.gguf"
        command = [options.llama / "llama-quantize", files["bf16"], files[kind], kind]
        subprocess.run([str(word) for word in command], capture_output=True, check=True)
    return {
        ("llama.cpp", BITS[kind], what): lambda turn, file=file, what=what: llama(
            options.llama, file, options.threads, what
        )
        for kind, file in files.items()
        for what in ("prefill", "decode")
    }


def measure(name: str, options: argparse.Namespace) -> tuple[nn.Module, Times, dict[Task, str], list[float]]:
    """Run all implementations of one model in turn, and read memory beside them."""
    model = build(name)
    with tempfile.TemporaryDirectory() as folder:
        tasks, left_out = ways(name, model, options.batches)
        if options.llama:
            tasks |= llamas(name, model, options, Path(folder))
        tasks["memory", 16, "read"] = Bandwidth()
        times = in_turn(tasks, options.rounds)
    return model, times, left_out, times.pop(("memory", 16, "read"))


def rows_of(model: nn.Module, times: Times, left_out: dict[Task, str], bandwidths: list[float]) -> list[dict[str, str]]:
    """One row per implementation, bits and task; ratios are taken round by round."""
    rows = []
    for (implementation, bits, what), speeds in times.items():
        row = {"implementation": implementation, "bits": str(bits), "what": what}
        row |= summary(("tok_per_s", "quartiles"), speeds)
        if what in ("decode", "generate"):
            shares = [s * bytes_per_step(model, bits) / b / 1e9 for s, b in zip(speeds, bandwidths, strict=True)]
            row["share_of_bandwidth"] = f"{quartiles(shares)[1]:.3f}"
            row["bandwidth_gb_per_s"] = f"{quartiles(bandwidths)[1]:.3g}"
        peer = times.get(("llama.cpp", bits, "decode" if what == "generate" else what))
        if peer and implementation != "llama.cpp":
            row["over_llama.cpp"] = f"{quartiles(ratios(speeds, peer))[1]:.3f}"
        rows.append(row)
    return rows + [
        {"implementation": implementation, "bits": str(bits), "what": what, "quartiles": reason}
        for (implementation, bits, what), reason in left_out.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=3, file="decode-cpu.csv")
    options.add_argument("--llama", type=Path, help="folder of llama-bench and llama-quantize")
    options.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options.add_argument("--batches", nargs="*", type=int, default=[4, 16, 64])
    chosen = options.parse_args()
    avx2 = os.environ.get("ATEN_CPU_CAPABILITY") == "avx2"
    if chosen.llama and (reason := why_not(chosen.llama, avx2=avx2)):
        options.error(reason)
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    begin = start(chosen)
    for what in points(chosen, begin, [{"model": name} for name in chosen.models]):
        report(chosen.out, FIELDS, [begin | what | row for row in rows_of(*measure(what["model"], chosen))])


if __name__ == "__main__":
    main()
