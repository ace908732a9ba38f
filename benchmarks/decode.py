"""Time whole models token by token on a CPU: transformers, moeify with 16, 8 and 4 bits, and llama.cpp.

The models have random weights: a Mixtral of 973 M parameters, 279 M of them active per token, a dense model of equal
total size, and one of equal active size. In every round all implementations run in turn (A B C A B C ...); a row holds
the median and quartiles over rounds. The share of the bandwidth limit is (bytes of the weights that a token reads) x
(tokens per second) over what a plain sum reads per second in the same rounds. benchmarks/README.md says how to get the
tools of llama.cpp.

    python benchmarks/decode.py --llama build/bin --out benchmarks/results/decode-cpu.csv
    python benchmarks/decode.py --models sparse --rounds 3                                without llama.cpp
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from gguf_models import write
from run import hardware, quartiles
from torch import nn
from transformers import DynamicCache

from moeify.serve import fast_decode
from moeify.serve.fast import cache_name
from moeify.serve.memory import into_huge_pages

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "sparse": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SHAPE, intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2)
    ),
    "dense-total": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, intermediate_size=8 * 3584)),
    "dense-active": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE, intermediate_size=2 * 3584)
    ),
}
BITS = {"bf16": 16, "q8_0": 8, "q4_0": 4}
FIELDS = [
    "date", "commit", "device", "threads", "torch", "transformers", "model", "implementation", "bits", "what",
    "tok_per_s", "quartiles", "share_of_bandwidth", "over_llama.cpp", "bandwidth_gb_per_s",
]  # fmt: skip
PROMPT, GENERATED = 512, 64

Times = dict[tuple[str, int, str], list[float]]
"""Tokens per second of every round, by implementation, bits and what is done."""


def build(name: str) -> nn.Module:
    """One of the models, in bf16, with small random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = MODELS[name]()
        model = model.to_empty(device="cpu").eval()
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
def decode(model: nn.Module, batch: int, tokens: int = GENERATED) -> float:
    """Tokens per second of all sequences, behind a prompt of two."""
    cache = DynamicCache()
    ids = torch.arange(2 * batch).view(batch, 2) + 100
    ids = model(ids, **{cache_name(model): cache}, use_cache=True).logits[:, -1:].argmax(-1)
    ids = model(ids, **{cache_name(model): cache}, use_cache=True).logits.argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        ids = model(ids, **{cache_name(model): cache}, use_cache=True).logits.argmax(-1)
    return batch * tokens / (time.perf_counter() - start)


@torch.no_grad()
def prefill(model: nn.Module) -> float:
    """Tokens per second of a prompt, up to the logits of its last token."""
    ids = torch.arange(PROMPT).unsqueeze(0) * 61 % SHAPE["vocab_size"]
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return PROMPT / (time.perf_counter() - start)


def generate(model: nn.Module) -> float:
    """Tokens per second through `model.generate`, its own work included."""
    ids = torch.arange(2).view(1, 2) + 100
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    return GENERATED / (time.perf_counter() - start)


def llama(tools: Path, file: Path, threads: int) -> dict[str, float]:
    """What llama-bench says of prompt and generation, one repetition behind a warm-up."""
    command = [tools / "llama-bench", "-m", file, "-t", threads, "-p", PROMPT, "-n", GENERATED, "-r", 1, "-o", "json"]
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
    tests = json.loads(said)
    return {"prefill" if test["n_prompt"] else "decode": float(test["avg_ts"]) for test in tests}


def bandwidth(memory: torch.Tensor) -> float:
    """GB per second that a sum reads."""
    start = time.perf_counter()
    memory.sum()
    return memory.numel() * memory.element_size() / (time.perf_counter() - start) / 1e9


def bytes_per_token(model: nn.Module, bits: int) -> float:
    """Of the weights that a token reads, without the embedding; 4 bits have scales beside, the head keeps 8."""
    config = model.config
    body = sum(p.numel() for name, p in model.model.layers.named_parameters() if "experts" not in name)
    experts = sum(p.numel() for name, p in model.model.layers.named_parameters() if "experts" in name)
    if experts:
        body += experts * config.num_experts_per_tok / config.num_local_experts
    return body * {16: 2, 8: 1, 4: 0.5625}[bits] + model.lm_head.weight.numel() * {16: 2, 8: 1, 4: 1}[bits]


def ways(name: str, model: nn.Module, batches: list[int]) -> dict[tuple[str, int, str], Callable[[], float]]:
    """What is timed in this process, by implementation, bits and what it does."""
    best = "eager"
    if name == "sparse":
        found = {}
        for implementation in ("eager", "grouped_mm"):
            model.set_experts_implementation(implementation)
            found[implementation] = max(decode(model, 1, 4) for _ in range(2))
        best = max(found, key=found.__getitem__)
        model.set_experts_implementation(best)
    tasks: dict[tuple[str, int, str], Callable[[], float]] = {}
    contenders = [(f"transformers/{best}" if name == "sparse" else "transformers", 16, model)]
    contenders += [("moeify", bits, twin(model, bits)) for bits in (BITS.values() if name == "sparse" else [16])]
    for implementation, bits, contender in contenders:
        tasks[implementation, bits, "decode"] = lambda c=contender: decode(c, 1)
        tasks[implementation, bits, "prefill"] = lambda c=contender: prefill(c)
        if implementation == "moeify":
            tasks[implementation, bits, "generate"] = lambda c=contender: generate(c)
        if bits == 16 and name != "dense-active":
            for batch in batches:
                tasks[implementation, bits, f"decode, batch {batch}"] = lambda c=contender, b=batch: decode(c, b, 8)
    return tasks


def measure(name: str, options: argparse.Namespace, folder: Path) -> tuple[nn.Module, Times, list[float]]:
    """Run all implementations of one model in turn."""
    model = build(name)
    files = {}
    if options.llama:
        files = {"bf16": folder / f"{name}-bf16.gguf"}
        write(model, files["bf16"])
        for kind in ("q8_0", "q4_0") if name == "sparse" else ():
            files[kind] = folder / f"{name}-{kind}.gguf"
            command = [options.llama / "llama-quantize", files["bf16"], files[kind], kind]
            subprocess.run([str(word) for word in command], capture_output=True, check=True)
    tasks = ways(name, model, options.batches)
    memory = nn.Embedding(200_000, 1000)  # read as the weights are
    into_huge_pages([memory])
    times: Times = {}
    bandwidths = []
    for task in tasks.values():
        task()
    for _ in range(options.rounds):
        for key, task in tasks.items():
            times.setdefault(key, []).append(task())
        for kind, file in files.items():
            for what, speed in llama(options.llama, file, options.threads).items():
                times.setdefault(("llama.cpp", BITS[kind], what), []).append(speed)
        bandwidths.append(max(bandwidth(memory.weight.detach()) for _ in range(3)))
    for file in files.values():
        file.unlink()
    return model, times, bandwidths


def rows_of(model: nn.Module, times: Times, bandwidths: list[float]) -> list[dict[str, str]]:
    """One row per implementation, bits and task; ratios are taken round by round."""
    rows = []
    for (implementation, bits, what), speeds in times.items():
        low, middle, high = quartiles(speeds)
        row = {
            "implementation": implementation, "bits": str(bits), "what": what,
            "tok_per_s": f"{middle:.4g}", "quartiles": f"{low:.4g}-{high:.4g}",
        }  # fmt: skip
        if what in ("decode", "generate"):
            shares = [s * bytes_per_token(model, bits) / b / 1e9 for s, b in zip(speeds, bandwidths, strict=True)]
            row["share_of_bandwidth"] = f"{quartiles(shares)[1]:.3f}"
            row["bandwidth_gb_per_s"] = f"{quartiles(bandwidths)[1]:.3g}"
        peer = times.get(("llama.cpp", bits, "decode" if what == "generate" else what))
        if peer and implementation != "llama.cpp":
            row["over_llama.cpp"] = f"{quartiles([s / p for s, p in zip(speeds, peer, strict=True)])[1]:.3f}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="folder of llama-bench and llama-quantize")
    parser.add_argument("--out", type=Path, help="CSV file to append rows to")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = {
        "date": datetime.date.today().isoformat(), "commit": commit, "device": hardware("cpu"),
        "threads": str(options.threads), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            for row in rows_of(*measure(name, options, Path(folder))):
                rows.append(head | {"model": name} | row)
                print(name, *row.values(), sep="  ", flush=True)
    if options.out:
        is_new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if is_new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
