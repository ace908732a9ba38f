"""The register of claims: every measured figure of README, docs and changelog, with the row that it comes from.

Texts name ids in comments that no reader sees (`figures/texts.py`), `figures/sources.py` computes the figures of an id
from rows, and `register.json` holds both: as printed and as measured, source, date, commit, hardware, seeds, and all
figures that are no claims, with the reason. The check finds figures without an id, ids that no text uses, figures
that differ from their rows, figures rounded in our favour, and claims without a row in docs/claims.md.

Rounding: to the less flattering side where a side flatters moeify, to the nearest elsewhere.

python claims/register.py            checks
python claims/register.py --write    writes claims/register.json, then checks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures.rows import Figure
from figures.sources import sources
from figures.texts import NO_PAGES, ROOT, Number, Passage, pages, passages

REGISTER = Path(__file__).parent / "register.json"
CLAIMS = Path(__file__).parent
NO_CLAIMS = {"register", "results"}
"""Files of this folder that are run for no claim."""
SMALL = "## How each was made small"
"""The heading between both tables of docs/claims.md."""


def agrees(number: Number, figure: Figure) -> bool:
    """Whether a printed number is the figure, rounded to the less flattering side."""
    step, off, slack = number.step, number.value - figure.value, 1e-9 * max(1.0, abs(figure.value))
    if figure.better == "lower":
        return -slack <= off < step - slack
    if figure.better == "higher":
        return -slack <= -off < step - slack
    return abs(off) <= step / 2 + slack


def match(numbers: Sequence[Number], figures: Sequence[Figure]) -> list[Number] | None:
    """The numbers that are the figures, in order, and none that looks measured besides; None if there are none."""
    if not figures:
        return None if any(number.measured for number in numbers) else []
    for at, number in enumerate(numbers):
        if agrees(number, figures[0]):
            rest = match(numbers[at + 1 :], figures[1:])
            if rest is not None:
                return [number, *rest]
        if number.measured:
            return None
    return None


def faults(found: Sequence[Passage], known: Mapping[str, Sequence[Figure]]) -> Iterator[str]:
    """What is wrong with the figures of texts, one sentence each, with page and line."""
    used = set()
    for passage in found:
        at = f"{passage.page}:{passage.line}:"
        measured = [number.printed for number in passage.numbers if number.measured]
        if not passage.kind and measured:
            yield f"{at} {', '.join(measured)} have no id; <!-- claim: ID --> or <!-- no claim: REASON --> must follow"
        if passage.kind == "no claim" and not passage.about:
            yield f"{at} no claim, and no reason"
        if passage.kind != "claim":
            continue
        ids = [name.strip() for name in passage.about.split(",")]
        unknown = [name for name in ids if name not in known]
        if unknown:
            yield f"{at} {', '.join(unknown)} has no source in claims/figures/sources.py"
            continue
        used.update(ids)
        figures = [figure for name in ids for figure in known[name]]
        if match(passage.numbers, figures) is None:
            yield f"{at} {passage.about} is {_said(figures)}; the text has {_printed(passage.numbers)}"
    for name, figures in known.items():
        facts = [dict(figure.facts) for figure in figures]
        missing = {fact for fact in ("date", "hardware") for each in facts if not each.get(fact)}
        if missing:
            yield f"{name} does not say its {' and '.join(sorted(missing))}"
    for name in sorted(known.keys() - used):
        yield f"{name} has sources, and no text uses it"


def unlisted(table: str) -> list[str]:
    """Claims that have no row in the table of docs/claims.md."""
    claims = sorted(path.name for path in CLAIMS.glob("*.py") if path.stem not in NO_CLAIMS)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [name for name in claims if not any(f"`{name}`" in row for row in rows)]


def register(found: Sequence[Passage], known: Mapping[str, Sequence[Figure]]) -> dict[str, Any]:
    """What `register.json` holds."""
    entries: dict[str, Any] = {}
    for passage in found:
        if passage.kind != "claim":
            continue
        ids = [name.strip() for name in passage.about.split(",") if name.strip() in known]
        figures = [figure for name in ids for figure in known[name]]
        numbers = iter(match(passage.numbers, figures) or [])
        for name in ids:
            texts = entries.setdefault(name, {"figures": [_entry(figure) for figure in known[name]], "pages": []})
            for entry in texts["figures"]:
                printed = next(numbers, None)
                if printed is not None and printed.printed not in entry["printed"]:
                    entry["printed"].append(printed.printed)
            if passage.page not in texts["pages"]:
                texts["pages"].append(passage.page)
    left_out = [
        {"page": passage.page, "figures": measured, "reason": passage.about}
        for passage in found
        if passage.kind == "no claim"
        and (measured := [number.printed for number in passage.numbers if number.measured])
    ]
    return {"claims": dict(sorted(entries.items())), "no claims": left_out, "pages left out": NO_PAGES}


def _entry(figure: Figure) -> dict[str, Any]:
    side = {"lower": "up", "higher": "down", "": "to the nearest"}[figure.better]
    entry = {
        "printed": [], "measured": float(f"{figure.value:.8g}"), "rounded": side, "source": figure.source,
        "rows": figure.rows, "take": figure.take,
    }  # fmt: skip
    return entry | dict(figure.facts)


def _said(figures: Sequence[Figure]) -> str:
    sides = {"lower": " (round up)", "higher": " (round down)", "": ""}
    return ", ".join(f"{figure.value:.6g}{sides[figure.better]}" for figure in figures)


def _printed(numbers: Sequence[Number]) -> str:
    return ", ".join(number.printed for number in numbers) or "no number"


def text_of(found: Sequence[Passage], known: Mapping[str, Sequence[Figure]]) -> str:
    return json.dumps(register(found, known), indent=1, ensure_ascii=False) + "\n"


def check() -> list[str]:
    """All that is wrong now."""
    found, known = [passage for page in pages() for passage in passages(page)], sources()
    wrong = list(faults(found, known))
    results, small = (ROOT / "docs/claims.md").read_text("utf-8").split(SMALL)
    wrong += [f"docs/claims.md has no row for {name}" for name in unlisted(results)]
    wrong += [f"docs/claims.md does not say how {name} was made small" for name in unlisted(small)]
    if not REGISTER.is_file() or REGISTER.read_text("utf-8") != text_of(found, known):
        wrong.append("claims/register.json is not that of the texts: python claims/register.py --write")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write claims/register.json")
    if parser.parse_args().write:
        found = [passage for page in pages() for passage in passages(page)]
        REGISTER.write_text(text_of(found, sources()), "utf-8")
    wrong = check()
    print("\n".join(wrong) or "every measured figure has its row")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
