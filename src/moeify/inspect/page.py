"""The report of a comparison as one HTML file with embedded pictures."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moeify.evaluate.verdict import axis_names, headline, verdict
from moeify.evaluate.versus import Versus
from moeify.files import write_text
from moeify.inspect.load import ExpertLoad

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_report(
    file: Path,
    versus: Versus,
    load: ExpertLoad | None,
    pictures: Sequence[Path],
    samples: dict[str, list[str]],
    facts: dict[str, Any],
) -> None:
    """Write a page: the verdict in words, then pictures, then numbers, what was run, and what the models answer.

    Args:
        file: where to write the page.
        versus: the comparison.
        load: the experts' load, if it was measured.
        pictures: PNG files to put into the page.
        samples: what each model answers, such as texts that it writes.
        facts: what was trained on which data, by name.
    """
    parts = [
        "<h1>A sparse model and its dense baseline</h1>",
        *(f"<p><b>{escape(line)}</b></p>" for line in says(versus, load)),
    ]
    parts += [f'<p><img alt="{escape(p.stem)}" src="{_inline(p)}"></p>' for p in pictures]
    parts += ["<h2>Validation loss when both have spent the same</h2>", table(*comparison_rows(versus))]
    if versus.scores:
        parts += ["<h2>Scores at the end</h2>", table(*score_rows(versus))]
    parts += ["<h2>Size and speed</h2>", table(*size_rows(versus))]
    if load is not None:
        parts += ["<h2>Experts</h2>", table(*load_rows(load))]
    parts += ["<h2>What was run</h2>", table(("", ""), facts.items())]
    for name, texts in samples.items():
        parts += [f"<h2>What the {escape(name)} model answers</h2>", *(f"<pre>{escape(text)}</pre>" for text in texts)]
    body = printable("\n".join(parts))
    write_text(
        file,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_policy()}<title>moeify report</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n",
    )


def printable(text: str) -> str:
    """The text; what UTF-8 cannot encode, such as bytes of a file name in another encoding, becomes escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _policy() -> str:
    """Content security policy: the page may use its own style and embedded pictures, and nothing else."""
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    allowed = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'


def says(versus: Versus, load: ExpertLoad | None) -> list[str]:
    """The verdict in sentences: which model is ahead, by how much, and whether its expert load is balanced."""
    return [headline(versus), sentence(verdict(versus)), *([] if load is None else [load_sentence(load)])]


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def load_sentence(load: ExpertLoad) -> str:
    """How evenly the experts are used, in words."""
    busiest, layer = load.max_violation.max(0)
    dead = int(load.dead.sum())
    share = f"The busiest expert, in {load.layers[int(layer)]}, takes {1 + float(busiest):.1f} times its fair share"
    worst = f" (MaxVio {float(busiest):.2f}; 0 is even)"
    return f"{share}{worst}; {dead or 'no'} expert{'s are' if dead > 1 else ' is'} dead."


Rows = tuple[Sequence[str], Sequence[Sequence[str]]]


def comparison_rows(versus: Versus) -> Rows:
    """Heading and rows of the comparison: the validation loss on every axis."""
    names = axis_names(versus)
    rows = []
    for d in versus.differences:
        spread = "one seed" if d.spread is None else f"± {d.spread:.4f} over {d.seeds} seeds"
        clear = "" if d.is_clear else ", too noisy to tell"
        found = (f"{d.sparse:.4f}", f"{d.dense:.4f}", f"{d.difference:+.4f}")
        rows.append((f"equal {names[d.axis]}", *found, f"{spread}{clear}"))
    return ("at", "sparse", "dense baseline", "sparse - dense", "spread"), rows


def score_rows(versus: Versus) -> Rows:
    """Heading and rows of the scores at the end, means over seeds."""
    rows = [
        (name, f"{sparse:.4f}", f"{dense:.4f}", f"{sparse - dense:+.4f}")
        for name, (sparse, dense) in versus.scores.items()
    ]
    return ("score", "sparse", "dense baseline", "sparse - dense"), rows


def size_rows(versus: Versus) -> Rows:
    """Heading and rows of parameters, FLOPs and speed."""
    first, units = (versus.sparse[0], versus.dense[0]), versus.units
    second = "CPU second" if versus.pace is not None and versus.pace.clock == "CPU" else "second"
    rows = [
        ("parameters", *(f"{run.count.parameters:,}" for run in first)),
        (f"parameters used per {units.piece}", *(f"{run.count.active_parameters:,.0f}" for run in first)),
        (f"forward FLOPs per {units.piece}, attention included", *(f"{run.count.flops:,.0f}" for run in first)),
        (f"training {units.pieces} per {second}", *(f"{speed:,.0f}" for speed in versus.tokens_per_second)),
    ]
    if versus.pace is not None:
        seconds = (f"{cost:.3f}" for cost in versus.pace.seconds)
        rows.append((f"{versus.pace.clock} seconds per step, measured by turns", *seconds))
    return ("", "sparse", "dense baseline"), rows


def load_rows(load: ExpertLoad) -> Rows:
    """Heading and rows of balance and specialisation by layer."""
    rows = [
        (layer, f"{load.max_violation[i]:.2f}", f"{int(load.dead[i])}", f"{load.information[i]:.3f}")
        for i, layer in enumerate(load.layers)
    ]
    return ("layer", "MaxVio (max load / mean - 1)", "dead experts", "expert-domain information (bits)"), rows


def table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
