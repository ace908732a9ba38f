"""Write panels as one HTML file that works offline."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from moeify.files import write_text
from moeify.inspect.panels.charts import visible
from moeify.inspect.panels.panel import Advice, Panel
from moeify.version import __version__

_LEVELS = {"act": "act", "look": "improve", "fine": "fine", "unknown": "unknown"}
_WORDS = {
    "row": "one token's visit to one expert; a token that goes to two experts is two rows",
    "load": "the rows of an expert; the fair share is the mean of its layer",
    "layer": "is named by what sets it apart: model.layers.3.mlp is 3",
    "nat, bit": "units of loss and of information: one nat is 1.44 bits",
    "entropy / log E": "0 if everything goes to one of the E experts, 1 if all get the same",
    "MaxVio": "the busiest expert's load over the fair share, minus 1",
    "CV²": "variance over squared mean: 0 is even",
    "chance": "what shuffled tokens give; a difference whose interval holds 0 is no finding",
}
_SCRIPTS = ("canvas.js", "tokens.js", "page.js")


def write_page(
    file: Path, title: str, facts: Mapping[str, Any], groups: Mapping[str, Sequence[Panel]], missing: Iterable[str] = ()
) -> None:
    """Write panels as one page.

    Args:
        file: where to.
        title: the name of the model or trace.
        facts: about it, by name.
        groups: panels by tab.
        missing: what is not shown, and why.
    """
    style, script = _part("page.css"), "\n".join(_part(name) for name in _SCRIPTS)
    panels = [panel for group in groups.values() for panel in group]
    names = {id(panel): f"panel-{number}" for number, panel in enumerate(panels)}
    data = {names[id(panel)]: panel.picture.to_dict() for panel in panels}
    parts = [_header(title, facts), "<main>", _glance(panels, names)]
    for group, members in groups.items():
        shown = "\n".join(_section(panel, names[id(panel)]) for panel in members)
        parts.append(f'<div data-tab="{escape(group)}"><h2 class="group">{escape(group)}</h2>\n{shown}</div>')
    if reasons := [f"<li>{_safe(reason)}</li>" for reason in missing]:
        parts.append(
            f'<details class="missing"><summary>Not shown, and why</summary><ul>{"".join(reasons)}</ul></details>'
        )
    parts.append(f'<details class="missing"><summary>Words</summary><dl>{_words()}</dl></details>')
    parts.append(f'<p class="note">moeify {__version__}. This file loads nothing.</p></main>')
    policy = (
        f"default-src 'none'; script-src 'sha256-{_hash(script)}'; style-src 'sha256-{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    write_text(
        file,
        '<!doctype html>\n<html lang="en" data-theme="light"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{style}</style></head><body>\n"
        + "\n".join(parts)
        + f'\n<script type="application/json" id="charts">{_json(data)}</script>\n'
        + f"<script>{script}</script></body></html>\n",
    )


def _part(name: str) -> str:
    return files("moeify.inspect").joinpath("html", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _safe(value: Any) -> str:
    return escape(visible(str(value)))


def _json(data: Any) -> str:
    """JSON in ASCII in which no `<` can end the script around it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _header(title: str, facts: Mapping[str, Any]) -> str:
    said = " · ".join(f"{_safe(name)} {_safe(value)}" for name, value in facts.items())
    button = '<button type="button" id="theme" hidden>Dark colours</button>'
    hint = "Point at, tap, or focus a chart, a text or an image (arrow keys move): the value is written below it."
    return (
        f'<header><h1>{_safe(title)}</h1>{button}<p class="facts">{said}</p>'
        f'<p class="note facts" id="hint" hidden>{hint}</p></header>'
    )


def _words() -> str:
    return "".join(f"<dt>{_safe(word)}</dt><dd>{_safe(meaning)}</dd>" for word, meaning in _WORDS.items())


def _glance(panels: Sequence[Panel], names: Mapping[int, str]) -> str:
    """One line for every panel, the urgent ones first, with what to do; panels without a problem are collapsed."""
    rows: dict[str, list[str]] = {level: [] for level in _LEVELS}
    worst = min((panel.advice.level for panel in panels), key=list(_LEVELS).index)
    for panel in panels:
        advice = panel.advice
        do = f"<small>→ {_safe(advice.action)}</small>" if advice.level == worst and worst in ("act", "look") else ""
        rows[advice.level].append(
            f'<li><a href="#{names[id(panel)]}"><span class="level {advice.level}">{_LEVELS[advice.level]}</span>'
            f"<span>{_safe(panel.title)}</span><span>{_safe(advice.finding)}{do}</span></a></li>"
        )
    urgent, quiet = rows["act"] + rows["look"], rows["fine"] + rows["unknown"]
    shown = f'<ul class="glance" aria-label="findings">{"".join(urgent)}</ul>' if urgent else ""
    said = " and ".join(f"{len(rows[level])} {level}" for level in ("fine", "unknown") if rows[level])
    folded = f'<details class="quiet"><summary>{said}</summary><ul class="glance">{"".join(quiet)}</ul></details>'
    return shown + (folded if quiet else "")


def _section(panel: Panel, name: str) -> str:
    return (
        f'<section class="panel" id="{name}" tabindex="-1"><h2>{_safe(panel.title)}</h2>'
        f'<p class="question">{_safe(panel.question)}</p>'
        f'<div data-chart="{name}" data-label="{_safe(panel.title)}"></div>'
        + "".join(f'<p class="note">{_safe(note)}</p>' for note in panel.notes)
        + _advice(panel.advice)
        + f"<details><summary>Numbers</summary>{_table(panel)}</details></section>"
    )


def _advice(advice: Advice) -> str:
    return (
        f'<div class="advice {advice.level}"><div><p>{_safe(advice.finding)}</p>'
        f"<dl><dt>do</dt><dd>{_safe(advice.action)}</dd><dt>gain</dt><dd>{_safe(advice.gain)} "
        f'<span class="source">({_safe(advice.source)})</span></dd></dl></div></div>'
    )


def _table(panel: Panel) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in panel.table.heading)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in panel.table.rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    return f'<td class="words">{_safe(value)}</td>' if isinstance(value, str) else f"<td>{_safe(value)}</td>"
