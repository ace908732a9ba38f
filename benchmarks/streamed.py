"""Trace a model that is larger than the memory it may use: a checkpoint of random weights, read while it runs.

Writes a checkpoint of Qwen3-30B-A3B's shape, shard by shard, 1.2 GB of bf16 per layer. A process that the system gives
no more than the limit, beside what libraries reserved when they were imported and never touched (RLIMIT_DATA, which
counts mapped files as well), traces it by `moeify.inspect.stream` and writes the page of the trace. Its peak of
resident memory is measured. The checkpoint is deleted afterwards; 10 layers need 14 GB on disk, the real model's 48
62 GB, with widths divided by 8 1.3 GB. Linux only.

    python benchmarks/streamed.py
    python benchmarks/streamed.py --layers 48 --tokens 8192
    python benchmarks/streamed.py --layers 48 --narrow 8 --tokens 512 --gib 1
    python benchmarks/streamed.py --layers 1 --tokens 64 --out /tmp/streamed.csv
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from measure import HEAD, parser, report, start
from peak import resident
from safetensors.torch import save_file
from torch import Tensor

from moeify.inspect import capture, stream
from moeify.inspect import report as page

WIDTH, HIDDEN, EXPERTS, K, HEADS, GROUPS, HEAD_WIDTH, VOCABULARY = 2048, 768, 128, 8, 32, 4, 128, 151_936
LENGTH = 512
FIELDS = [
    *HEAD, "model", "layers", "experts", "checkpoint_gb", "tokens", "dtype", "limit_gib", "peak_resident_gib",
    "seconds_to_open", "seconds_to_trace", "gb_per_s",
]  # fmt: skip


def write(folder: Path, layers: int, narrow: int) -> int:
    """Write the checkpoint, one file per layer, and return its bytes; widths are divided by `narrow`."""
    width, hidden = WIDTH // narrow, HIDDEN // narrow
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=6144, moe_intermediate_size=hidden,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD_WIDTH,
        num_experts=EXPERTS, num_experts_per_tok=K, norm_topk_prob=True, tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    first = {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    shards = [first, *(layer(i, width, hidden) for i in range(layers)), {"lm_head.weight": (VOCABULARY, width)}]
    files: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: drawn(shape) for name, shape in shapes.items()}, folder / file)
        files |= dict.fromkeys(shapes, file)
        print(f"wrote {number + 1} of {len(shards)} files", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def layer(number: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer, as they are called on the hub, and their shapes."""
    attention = {
        "q_proj": (HEADS * HEAD_WIDTH, width), "k_proj": (GROUPS * HEAD_WIDTH, width),
        "v_proj": (GROUPS * HEAD_WIDTH, width), "o_proj": (width, HEADS * HEAD_WIDTH),
        "q_norm": (HEAD_WIDTH,), "k_norm": (HEAD_WIDTH,),
    }  # fmt: skip
    expert = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    parts = {
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,)),
        "mlp.gate": (EXPERTS, width),
        **{f"mlp.experts.{e}.{name}": shape for e in range(EXPERTS) for name, shape in expert.items()},
    }
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in parts.items()}


def drawn(shape: tuple[int, ...]) -> Tensor:
    """A norm of ones, or a matrix of random weights."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.fill_(1.0) if len(shape) == 1 else tensor.normal_(std=0.02)


def trace(folder: Path, tokens: int, dtype: str, gib: float) -> None:
    """Trace it under the limit, and print what that took."""
    reserved = 2**20 * (resident("VmData") - resident("VmRSS"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30 + reserved),) * 2)
    begun = time.perf_counter()
    model = stream(folder, dtype=getattr(torch, dtype))
    opened = time.perf_counter()
    ids = torch.randint(VOCABULARY, (-(-tokens // LENGTH), min(tokens, LENGTH)))
    found = capture(model, [{"input_ids": ids, "use_cache": False}])
    assert all(layer.experts.shape == (ids.numel(), K) for layer in found)
    page(found, file=folder / "inspect.html")
    peak = resident("VmHWM") / 2**10
    print(json.dumps({"opened": opened - begun, "traced": time.perf_counter() - opened, "peak": peak}))


def main() -> None:
    options = parser(__doc__, rounds=1, file="streamed-cpu.csv")
    options.add_argument("--layers", type=int, default=10)
    options.add_argument("--narrow", type=int, default=1, help="divide the widths of the model (1)")
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--gib", type=float, default=4.0, help="the limit of memory (4 GiB)")
    options.add_argument("--folder", type=Path, default=Path("streamed-checkpoint"), help="where the checkpoint goes")
    options.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    begin = start(chosen)
    if chosen.trace:
        trace(chosen.folder, chosen.tokens, chosen.dtype, chosen.gib)
        return
    chosen.folder.mkdir(parents=True)
    try:
        size = write(chosen.folder, chosen.layers, chosen.narrow)
        run = subprocess.run([sys.executable, *sys.argv, "--trace"], stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(chosen.folder)
    *said, last = run.stdout.splitlines()
    print(*said, sep="\n")
    found = json.loads(last)
    model = "Qwen3-30B-A3B" if chosen.narrow == 1 else f"Qwen3-30B-A3B, widths / {chosen.narrow}"
    row = {
        "model": model, "layers": str(chosen.layers), "experts": str(EXPERTS),
        "checkpoint_gb": f"{size / 1e9:.1f}", "tokens": str(chosen.tokens), "dtype": chosen.dtype,
        "limit_gib": f"{chosen.gib:g}", "peak_resident_gib": f"{found['peak']:.2f}",
        "seconds_to_open": f"{found['opened']:.1f}", "seconds_to_trace": f"{found['traced']:.0f}",
        "gb_per_s": f"{size / 1e9 / found['traced']:.3f}",
    }  # fmt: skip
    report(chosen.out, FIELDS, [begin | row])


if __name__ == "__main__":
    main()
