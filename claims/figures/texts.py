"""Measured figures in Markdown, and the comments that say where each of them comes from.

A figure counts as measured if it looks like a result, outside of code:

- with a unit: %, times, x, µs to hours, KB to TiB, tokens or FLOPs per second, nats, points;
- with a spread (±), or a signed decimal as differences are printed;
- a decimal with at least three significant digits, three of them or more after the point, as losses are printed;
- counts of successes, "n of m", and agreements, "to 1e-5";
- a correlation or an accuracy.

What has such a form and is of a paper or a setting is marked as no claim, with the reason. Comments, which neither
GitHub nor mkdocs shows, follow what they are about in the same paragraph, item or row of a table:

    <!-- claim: demo.tokens -->             the figures since the last comment are those of this id, in its order
    <!-- no claim: published by ST-MoE -->  they are no measurement of ours
    <!-- no claims below: aims -->          nothing is, until the next heading
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_PAGES = {
    "docs/log.md": "the notebook of all runs, dated: a source of figures",
    "docs/api.md": "generated of docstrings",
}
"""Pages that are not searched, and why."""

_COMMENT = re.compile(r"<!-- *(claim|no claim|no claims below): *(.*?) *-->", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w./\-])(?:(?<![)\]])[+-])?\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?(?![\w\-]*[A-Za-z]\w)(?!\.?\d)"
)
_N = r"(?<![\w./\-])[+-]?\d+(?:,\d{3})*(?:\.\d+)?"
_UNIT = (
    r"(?:%|times\b|x\b|µs\b|ms\b|s\b|(?:micro)?seconds\b|minutes?\b|hours?\b|[KMGT]i?B\b|nats\b|points\b"
    r"|tokens (?:per|a) second|tokens/s|[GT]FLOP/s)"
)
_MEASURED = re.compile(
    "|".join([
        rf"(?:{_N}(?: %)?(?:, | to | and | or ))*{_N} ?{_UNIT}",
        rf"{_N} ?± ?\d+(?:\.\d+)?",
        r"(?<![\w.)\-])[+-]\d+\.\d+(?:(?: to | and |, )[+-]?\d+\.\d+)*",
        r"(?<![\w.\-])(?:0\.\d*[1-9]\d\d+|[1-9]\d*\.\d{3,})(?![\d.\w])",
        rf"{_N} of {_N}(?! experts)",
        r"(?:to|within|most|than) \d(?:\.\d+)?e-\d+",
        r"(?:correlation|accuracy)(?: of)? \d\.\d+",
    ])
)  # fmt: skip
_NOT_PROSE = re.compile(
    r"^(?:```|~~~).*?^(?:```|~~~)|`[^`\n]+`|arXiv[ \n][\d.]+(?:,[ \n][\d.]+)*|https?://\S+|^ {4}[^\n]*|\]\([^)]*\)"
    r"|95[ \n]%(?=[ \n](?:interval|confidence)|:)",
    re.MULTILINE | re.DOTALL,
)
_NEW_BLOCK = re.compile(r"\s*$|\s*(?:[-*]|\d+\.) |\||#")


@dataclass(frozen=True)
class Number:
    """A number as it is printed."""

    printed: str
    measured: bool

    @property
    def value(self) -> float:
        return float(self.printed.replace(",", ""))

    @property
    def step(self) -> float:
        """One unit of the last digit."""
        mantissa, _, exponent = self.printed.partition("e")
        return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


@dataclass(frozen=True)
class Passage:
    """Numbers of a text between two comments.

    Attributes:
        page: path from the root of the repository.
        line: of the start.
        kind: `claim`, `no claim`, or nothing where no comment follows.
        about: ids, or the reason.
        numbers: in the order of the text.
        text: the prose.
    """

    page: str
    line: int
    kind: str
    about: str
    numbers: tuple[Number, ...]
    text: str


def pages() -> list[str]:
    """Paths of all pages that are searched: README, changelog and everything in docs."""
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [name for name in (page.relative_to(ROOT).as_posix() for page in found) if name not in NO_PAGES]


def passages(page: str, text: str | None = None) -> Iterator[Passage]:
    """The passages of a page that have numbers or a comment; `text` in the place of what the file has."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    text = _NOT_PROSE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    everything_below = ""
    for line, block in _blocks(text):
        if block.startswith("#"):
            everything_below = ""
        start = 0
        for comment in [*_COMMENT.finditer(block), None]:
            prose = block[start : comment.start() if comment else len(block)]
            kind, about = (comment[1], re.sub(r"\s+", " ", comment[2])) if comment else ("", "")
            if kind == "no claims below":
                everything_below, kind = about, "no claim"
            elif not kind and everything_below:
                kind, about = "no claim", everything_below
            numbers = tuple(numbers_of(prose))
            if comment or numbers:
                yield Passage(page, line + block.count("\n", 0, start), kind, about, numbers, prose.strip())
            start = comment.end() if comment else len(block)


def numbers_of(prose: str) -> Iterator[Number]:
    """All numbers of a text, and whether each looks like a measurement."""
    spans = [found.span() for found in _MEASURED.finditer(prose)]
    for found in _NUMBER.finditer(prose):
        printed = found[0]
        yield Number(printed, any(start <= found.start() < end for start, end in spans))


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, list items, rows of tables and headings, with the number of their first line."""
    first, lines = 1, list[str]()
    for number, line in enumerate(text.split("\n"), 1):
        if _NEW_BLOCK.match(line):
            if lines:
                yield first, "\n".join(lines)
            first, lines = number, []
        lines.append(line)
    yield first, "\n".join(lines)
