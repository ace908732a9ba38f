"""Write the table of recipes in `docs/guide/export.md`: `python -m moeify.export.table docs/guide/export.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from moeify.export.compatibility import Compatibility, compatibility
from moeify.export.families import DENSE
from moeify.files import write_text
from moeify.sparsify import recipes

BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"


def compatibilities(name: str, bases: Iterable[str]) -> dict[str, dict[str, Compatibility]]:
    """The compatibility of a named recipe on each base; without bases in which it finds no network."""
    found = {}
    for base in bases:
        try:
            found[base] = compatibility(recipes[name], base)
        except ValueError:
            continue
    return found


def row(name: str, found: dict[str, dict[str, Compatibility]]) -> str:
    """The row of a recipe: for each base the class of transformers and the architecture of llama.cpp."""
    cells = (", ".join(_cell(found[to]) for to in ("transformers", "gguf")) for found in found.values())
    return f"| `{name}` | {' | '.join(cells)} |"


def _cell(found: Compatibility) -> str:
    if found.architecture is None:
        return f"({found.trait.replace('_', ' ')})"
    return f"{found.architecture}{'+' if found.rewrites else ''}{'†' if found.without_capacity else ''}"


def table(names: Iterable[str], bases: Iterable[str]) -> str:
    """The table of recipes and bases, and below it those that no program can hold, in Markdown."""
    bases, rows, refused = list(bases), [], []
    for name in names:
        found = compatibilities(name, bases)
        if any(found.architecture for of_base in found.values() for found in of_base.values()):
            rows.append(row(name, found))
        else:
            refused.append(f"| `{name}` | {_first_reason(found)} |")
    heads = [f"| recipe | {' | '.join(DENSE[base].title for base in bases)} |", f"|---|{'---|' * len(bases)}"]
    return "\n".join([*heads, *rows, "", "| recipe that neither program can hold | why |", "|---|---|", *refused])


def _first_reason(found: dict[str, dict[str, Compatibility]]) -> str:
    return next(iter(found.values()))["transformers"].reason.replace("|", "\\|")


def main(page: Path) -> None:
    """Write the table between its markers in a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    write_text(page, f"{before}{BEGIN}\n{table(recipes, DENSE)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
