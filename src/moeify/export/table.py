"""Write the table of recipes in `docs/guide/export.md`: `python -m moeify.export.table docs/guide/export.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from moeify.export.families import DENSE
from moeify.export.plan import Outlook, plan
from moeify.files import write_text
from moeify.sparsify import recipes

BEGIN, END = "<!-- homes: begin -->", "<!-- homes: end -->"


def outlooks(name: str, bases: Iterable[str]) -> dict[str, dict[str, Outlook]]:
    """What a named recipe becomes on each base; a base that it finds nothing in is left out."""
    found = {}
    for base in bases:
        try:
            found[base] = plan(recipes[name], base)
        except ValueError:
            continue
    return found


def row(name: str, found: dict[str, dict[str, Outlook]]) -> str:
    """The row of a recipe: for each base the class of transformers and the architecture of llama.cpp."""
    cells = (", ".join(_cell(outlook[to]) for to in ("transformers", "gguf")) for outlook in found.values())
    return f"| `{name}` | {' | '.join(cells)} |"


def _cell(outlook: Outlook) -> str:
    if outlook.home is None:
        return f"({outlook.trait.replace('_', ' ')})"
    return f"{outlook.home}{'+' if outlook.rewrites else ''}{'†' if outlook.without_capacity else ''}"


def table(names: Iterable[str], bases: Iterable[str]) -> str:
    """The table of recipes and bases, and below it those without any home, in Markdown."""
    bases, rows, homeless = list(bases), [], []
    for name in names:
        found = outlooks(name, bases)
        if any(outlook.home for of_base in found.values() for outlook in of_base.values()):
            rows.append(row(name, found))
        else:
            homeless.append(f"| `{name}` | {_first_reason(found)} |")
    heads = [f"| recipe | {' | '.join(DENSE[base].title for base in bases)} |", f"|---|{'---|' * len(bases)}"]
    return "\n".join([*heads, *rows, "", "| recipe without a home | why |", "|---|---|", *homeless])


def _first_reason(found: dict[str, dict[str, Outlook]]) -> str:
    return next(iter(found.values()))["transformers"].reason.replace("|", "\\|")


def main(page: Path) -> None:
    """Write the table between its marks in a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    write_text(page, f"{before}{BEGIN}\n{table(recipes, DENSE)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
