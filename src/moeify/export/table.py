"""Write the tables of recipes in `docs/guide/export.md`: `python -m moeify.export.table docs/guide/export.md`.

Which class fits is found by `compatibility`; what was run in each program is in `benchmarks/results/exports.csv`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.progress import track

from moeify.export.compatibility import Compatibility, compatibility, tiny_model
from moeify.export.families import DENSE
from moeify.files import write_text
from moeify.sparsify import recipes
from moeify.store.vllm import vllm_routing

BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
GRAPHS = {"torch": "torch.export", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
TARGETS = {"transformers": "class of transformers", "gguf": "GGUF", "mlx": "MLX", **GRAPHS}
Results = Mapping[tuple[str, str, str], Mapping[str, str]]
"""Exports that were run, by recipe, base and program."""


def read_results(page: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """The exports that `benchmarks/exports.py` ran, for a page of `docs/guide`."""
    with (page.parents[2] / "benchmarks" / "results" / "exports.csv").open(newline="", encoding="utf-8") as lines:
        return {(row["recipe"], row["base"], row["to"]): row for row in csv.DictReader(lines)}


def compatibilities(name: str, bases: Iterable[str]) -> dict[str, dict[str, Compatibility]]:
    """The compatibility of a named recipe on each base; without bases in which it finds no network."""
    found = {}
    for base in bases:
        try:
            found[base] = compatibility(recipes[name], base)
        except ValueError:
            continue
    return found


def row(name: str, found: Mapping[str, Mapping[str, Compatibility]], results: Results) -> str:
    """The row of a recipe: for each base the class of transformers, the architecture of llama.cpp, and MLX."""
    cells = [
        ", ".join(
            _cell(to, each, passed=results.get((name, base, to), {}).get("result") == "passed")
            for to, each in of_base.items()
            if to != "mlx" or each.architecture
        )
        for base, of_base in found.items()
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def _cell(to: str, found: Compatibility, *, passed: bool) -> str:
    if found.architecture is None:
        return f"({found.trait.replace('_', ' ')})"
    title = "mlx" if to == "mlx" else found.architecture
    marked = f"{title}{'+' if found.rewrites else ''}{'†' if found.without_capacity else ''}"
    return marked if passed else f"*{marked}*"


def table(names: Iterable[str], bases: Iterable[str], results: Results) -> str:
    """The table of recipes and bases, and below it those that no program can hold, in Markdown."""
    bases, rows, refused = list(bases), [], []
    for name in names:
        found = compatibilities(name, bases)
        if any(found.architecture for of_base in found.values() for found in of_base.values()):
            rows.append(row(name, found, results))
        else:
            refused.append(f"| `{name}` | {_first_reason(found)} |")
    heads = [f"| recipe | {' | '.join(DENSE[base].title for base in bases)} |", f"|---|{'---|' * len(bases)}"]
    return "\n".join([*heads, *rows, "", "| recipe that no class can hold | why |", "|---|---|", *refused])


def _first_reason(found: dict[str, dict[str, Compatibility]]) -> str:
    return next(iter(found.values()))["transformers"].reason.replace("|", "\\|")


def programs(results: Results) -> str:
    """The table of programs with their versions, and of what was run in them, in Markdown."""
    of_program: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for (_, _, to), result in results.items():
        if result["result"] == "passed":
            of_program.setdefault((TARGETS[to], result["program"]), []).append(result)
    heads = ["| export | run in | passed | largest difference | same most likely token |", "|---|---|---|---|---|"]
    rows = []
    for (title, program), ran in sorted(of_program.items()):
        difference = max(float(result["difference"]) for result in ran)
        agreement = min(float(result["same_top_token"]) for result in ran)
        same = "everywhere" if agreement == 1 else f"at {agreement:.3g} of the positions"
        rows.append(f"| {title} | {program} | {len(ran)} | {difference:.0e} | {same} |")
    return "\n".join([*heads, *rows])


def graphs(names: Iterable[str], results: Results) -> str:
    """The table of recipes as graphs, in Markdown: the largest difference of outputs, or why there is no graph."""
    heads = [f"| recipe | {' | '.join(GRAPHS.values())} | vLLM |", f"|---|{'---|' * len(GRAPHS)}---|"]
    rows = [
        f"| `{name}` | {' | '.join(_graph(name, to, results) for to in GRAPHS)} | {_vllm(name)} |" for name in names
    ]
    return "\n".join([*heads, *rows])


def _vllm(name: str) -> str:
    return vllm_routing(tiny_model(recipes[name], "llama", layers=2))


def _graph(name: str, to: str, results: Results) -> str:
    kinds = {"llama": "texts", "vit": "images"}
    found = {kind: results[name, base, to] for base, kind in kinds.items() if (name, base, to) in results}
    said = [f"{kind} {_outcome(result)}" for kind, result in found.items()]
    return ", ".join(said) or "not run"


def _outcome(result: Mapping[str, str]) -> str:
    if result["result"] != "passed":
        return f"({result['reason']})".replace("|", "\\|")
    return f"{float(result['difference']):.0e}{'†' if 'capacity' in result['kind'] else ''}"


def main(page: Path) -> None:
    """Write the tables between their markers in a page."""
    text, results = page.read_text(encoding="utf-8"), read_results(page)
    before, _, rest = text.partition(BEGIN)
    each = track(recipes, "which classes hold each recipe")
    tables = "\n\n".join([programs(results), table(each, DENSE, results), graphs(recipes, results)])
    write_text(page, f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
