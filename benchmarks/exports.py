"""Exports a tiny model of every recipe and family to every program that can hold it, and compares their outputs.

A row is one export: how the program computes the model (`exact`, or after rewrites), the program with its version, the
largest difference of logits, and at how many positions the most likely token is the same. `refused` has the reason. The
rows of a combination replace earlier ones. Programs that are not installed are left out:

    pip install 'moeify[gguf,onnx,openvino]' llama-cpp-python mlx-lm 'mlx[cpu]'
    python benchmarks/exports.py --to transformers gguf mlx
    python benchmarks/exports.py --to torch onnx openvino --recipe mixtral switch --seconds 180

Weights are drawn so large that every part of a model shows in its logits. Graphs are traced from the model itself, of
two layers with few experts, so one family of language models (`llama`) and one of models of images (`vit`) stand for
all. An export that takes more CPU time than `--seconds` has a row that says so, `not run`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import hardware
from torch import nn

from moeify import Recipe, export, sparsify
from moeify.export.compatibility import tiny_model
from moeify.export.families import DENSE
from moeify.export.graph import check_program
from moeify.routers import Capacity, Router
from moeify.sparsify import recipes

FILE = Path(__file__).parent / "results" / "exports.csv"
KEY = ("recipe", "base", "to")
FOUND = ("result", "kind", "as", "program", "difference", "largest_logit", "same_top_token", "reason")
COLUMNS = (*KEY, *FOUND, "date", "commit", "hardware")
LIBRARIES = {"gguf": "llama_cpp", "mlx": "mlx_lm", "onnx": "onnxruntime", "openvino": "openvino"}
GRAPHS = {"torch": None, "onnx": export.OnnxFolder(), "openvino": export.OpenVinoFolder()}
CLASSES = {"transformers": export.HfFolder(), "gguf": export.GgufFile("f32"), "mlx": export.MlxFolder()}


class TooLong(BaseException):
    """An export has used its CPU time; no Exception, by which exporters say that an operator is missing."""


@contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """Context manager that raises `TooLong` once the process has computed for as many seconds; 0 is no limit."""

    def stop(*_: Any) -> None:
        raise TooLong

    if seconds:
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_PROF, 0)


def models(recipe: str, base: str, to: str) -> Iterator[tuple[str, nn.Module]]:
    """The tiny model with its capacity, if it has one, and without: what is written in the column `kind` for each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = _with_few_experts(recipes[recipe]) if to in GRAPHS else recipes[recipe]
        model = _of_images(made) if base == "vit" else tiny_model(made, base, layers=2 if to in GRAPHS else 4)
        _widen(model)
    yield "", model
    limits = [part for part in model.modules() if isinstance(part, Capacity)]
    for limit in limits:
        limit.eval_factor = math.inf
    if limits:
        yield "capacity off, ", model


def _with_few_experts(recipe: Recipe) -> Recipe:
    """The recipe with 4 experts, else 8, if these leave a choice, since a graph has operators for each of them."""
    for few in (4, 8):
        with suppress(ValueError):  # its experts or groups are of another number
            model = tiny_model(fewer := replace(recipe, num_experts=few), "llama", layers=2)
            chooses = all(getattr(part, "k", 1) < few for part in model.modules() if isinstance(part, Router))
            if few < recipe.num_experts and chooses:
                return fewer
    return recipe


def _of_images(recipe: Recipe) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10)
    return sparsify(ViTForImageClassification(config), recipe, verbose=False).eval()


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    """Larger weights; biases that are all zero stay so, as a rewrite may rely on it."""
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") or parameter.any():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def row(recipe: str, base: str, to: str) -> dict[str, Any] | None:
    """The result of one export; None where the table of the guide says that no class fits, and why."""
    exporter, reason = {**CLASSES, **GRAPHS}[to], None
    for kind, model in models(recipe, base, to):
        if to in CLASSES and exporter.supports(model):
            continue
        try:
            return _exported(model, to, exporter, kind)
        except Exception as error:  # of a program, too: the others are still to be run
            if not isinstance(error, ValueError):
                traceback.print_exc()
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            is_refusal = isinstance(error, export.Unsupported) or "cannot be exported" in said
            reason = reason or {"result": "refused" if is_refusal else "failed", "reason": said.partition(": ")[2]}
    return reason


def _exported(model: nn.Module, to: str, exporter: Any, kind: str) -> dict[str, Any]:
    found = None if to in GRAPHS else exporter.match(model)
    done = check_program(model) if to == "torch" else _verification(model, to, exporter)
    return {
        "result": "passed",
        "kind": kind + ("rewrites" if found is not None and found.rewrites else "exact"),
        "as": "graph" if found is None else found.family.title,
        "program": done.program.split(",")[0],
        "difference": f"{done.difference:.2g}",
        "largest_logit": f"{(GRAPHS['onnx'] if to == 'torch' else exporter).probe_of(model).size:.3g}",
        "same_top_token": f"{done.agreement:.4g}",
    }


def _verification(model: nn.Module, to: str, exporter: export.Exporter) -> export.Verification:
    with tempfile.TemporaryDirectory() as folder:
        return export.write(model, Path(folder) / "out", to, exporter=exporter).verification


def main() -> None:
    """Run the exports that are asked for, and write each row when it is there; exit with 1 if one failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--to", nargs="+", default=[*CLASSES, *GRAPHS], choices=[*CLASSES, *GRAPHS])
    options.add_argument("--recipe", nargs="+", default=[*recipes], choices=[*recipes])
    options.add_argument("--base", nargs="+", choices=[*DENSE, "vit"], help="default: all; for graphs llama and vit")
    options.add_argument("--new", action="store_true", help="only rows that the file lacks")
    options.add_argument("--seconds", type=float, default=0, help="CPU time that an export may take; default: any")
    options.add_argument("--hardware", default=hardware("cpu"), help="how the rows name the machine")
    options.add_argument("--out", type=Path, default=FILE)
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    rows = {}
    if chosen.out.exists():
        with chosen.out.open(newline="") as lines:
            rows = {tuple(each[name] for name in KEY): each for each in csv.DictReader(lines)}
    failed = []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for to in (to for to in chosen.to if find_spec(LIBRARIES.get(to, "torch"))):
        for recipe in chosen.recipe:
            for base in chosen.base or (["llama", "vit"] if to in GRAPHS else DENSE):
                if chosen.new and (recipe, base, to) in rows:
                    continue
                try:
                    with limited_to(chosen.seconds):
                        found = row(recipe, base, to)
                except ValueError:  # the recipe finds nothing in this family
                    found = None
                except TooLong:
                    found = {"result": "not run", "reason": f"it takes more than {chosen.seconds:.0f} s of CPU time"}
                if found is None:
                    continue
                dated = {"date": datetime.date.today().isoformat(), "commit": commit, "hardware": chosen.hardware}
                rows[recipe, base, to] = dict(zip(KEY, (recipe, base, to), strict=True)) | found | dated
                print(*(value for value in rows[recipe, base, to].values()), sep="  ", flush=True)
                _write(chosen.out, rows)
                failed += [f"{recipe} of {base} to {to}"] if found["result"] == "failed" else []
    if failed:
        sys.exit(f"{len(failed)} exports failed: {', '.join(failed)}; {chosen.out} has the reasons")


def _write(file: Path, rows: dict[tuple[str, ...], dict[str, Any]]) -> None:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
