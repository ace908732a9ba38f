"""Compare LoRA adapters as experts with PEFT: eight under Arrow's router, and one that is trained.

Both libraries read the same files, adapters beside every linear layer of a Llama of random weights. In fp32 their
logits must agree; in bf16 PEFT rounds its prototypes, and so chooses other adapters now and then. Arrow chooses 3 of 8
for every token, forward without gradients. One adapter takes forward and backward passes, its base frozen: no router is
needed, and a sparse layer can at best cost what PEFT's does.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --width 64 --layers 1 --tokens 1 16 --rounds 1 --out /tmp/adapters.csv
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from measure import HEAD, in_turn, parser, points, ratios, report, start, summary, timed
from peft.tuners.lora import ArrowConfig, create_arrow_model
from torch import Tensor, nn

from moeify import from_adapters
from moeify.routers import Arrow, Uniform

ADAPTERS, K, TOKENS = 8, 3, (1, 16, 128, 512)
CASES = ("Arrow, forward", "one adapter, forward and backward")
FIELDS = [
    *HEAD, "peft", "model", "rank", "case", "dtype", "tokens", "way", "ms", "quartiles_ms", "speedup_over_peft",
    "speedup_quartiles",
]  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-3
"""Of the largest logit, in fp32; PEFT finds directions by a power iteration."""


def dense(sizes: argparse.Namespace) -> nn.Module:
    """The base of all adapters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=sizes.width, intermediate_size=4 * sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def write(base: nn.Module, folder: Path, rank: int) -> list[Path]:
    """Adapters of random weights as PEFT writes them, each of which amplifies one direction most."""
    folders = [folder / str(number) for number in range(ADAPTERS)]
    for each in folders:
        settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        adapter = peft.get_peft_model(copy.deepcopy(base), settings)
        with torch.no_grad():
            for name, tensor in adapter.named_parameters():
                if "lora_B" in name:
                    tensor.normal_(std=0.02)[:, 0] *= 10
        adapter.save_pretrained(each)
    return folders


def arrows(base: nn.Module, folders: list[Path]) -> dict[str, nn.Module]:
    """The models under Arrow by the name of the library."""
    theirs = create_arrow_model(copy.deepcopy(base), list(map(str, folders)), ArrowConfig(top_k=K))
    ours = from_adapters(
        copy.deepcopy(base),
        {folder.name: folder for folder in folders},
        lambda width, num_experts: Arrow(width, num_experts, k=K),
        verbose=False,
    )
    return {"moeify": ours.eval(), "PEFT": theirs.eval()}


def singles(base: nn.Module, folder: Path) -> dict[str, nn.Module]:
    """The models with a single adapter, which alone is trained."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)
    ours = from_adapters(copy.deepcopy(base), {"only": folder}, Uniform, verbose=False)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return {"moeify": ours.train(), "PEFT": theirs.train()}


def must_agree(models: dict[str, nn.Module], ids: Tensor) -> None:
    """Both libraries give the same logits."""
    with torch.no_grad():
        ours, theirs = (models[name](input_ids=ids).logits for name in ("moeify", "PEFT"))
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not apart < TOLERANCE:
        raise RuntimeError(f"logits of moeify and PEFT differ by {apart:.2g} of the largest")


def step(model: nn.Module, ids: Tensor, gradients: bool, turn: int) -> None:
    with torch.set_grad_enabled(gradients):
        loss = model(input_ids=ids, labels=ids).loss
    if gradients:
        model.zero_grad()
        loss.backward()


def main() -> None:
    options = parser(__doc__, rounds=7, file="adapters-cpu.csv")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--width", type=int, default=1024)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    chosen = options.parse_args()
    head = start(chosen) | {
        "peft": peft.__version__, "model": f"Llama, {chosen.layers} layers of {chosen.width}", "rank": str(chosen.rank),
    }  # fmt: skip
    todo = [
        {"case": case, "dtype": dtype, "tokens": str(tokens)}
        for case in CASES
        for dtype in chosen.dtypes
        for tokens in chosen.tokens
        if tokens > 1 or case == CASES[0]
    ]
    base, models = dense(chosen), {}
    with tempfile.TemporaryDirectory() as folder:
        folders = write(base, Path(folder), chosen.rank)
        for point in points(chosen, head, todo):
            case, dtype = point["case"], point["dtype"]
            if (case, dtype) not in models:
                made = arrows(base, folders) if case == CASES[0] else singles(base, folders[0])
                models = {(case, dtype): {name: model.to(DTYPES[dtype]) for name, model in made.items()}}
            both, ids = models[case, dtype], torch.randint(1024, (1, int(point["tokens"])))
            if dtype == "float32":
                must_agree(both, ids)
            ways = {name: partial(step, model, ids, case != CASES[0]) for name, model in both.items()}
            for way in ways.values():
                way(0)
            measured = in_turn(timed(ways), chosen.rounds)
            rows = []
            for name, times in measured.items():
                found = summary(("ms", "quartiles_ms"), times)
                if name == "moeify":
                    faster = ratios(measured["PEFT"], times)
                    found |= summary(("speedup_over_peft", "speedup_quartiles"), faster, ".3f")
                rows.append(head | point | {"way": name} | found)
            report(chosen.out, FIELDS, rows)


if __name__ == "__main__":
    main()
