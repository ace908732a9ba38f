"""`moeify recipes`: list the named recipes by use, or show one: formula, settings, source and page."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from moeify.catalogue import USES, Entry, catalogue, name_of, search
from moeify.registry import suggest

ELSEWHERE = {
    "--task multitask --set method=mmoe, cgc or ple": ("mmoe", "cgc", "ple"),
    "--task instruct --finetune flan": ("flan", "flanmoe"),
    "--finetune esft": ("esft",),
}
"""Methods that `moeify train` has under other options than --recipe, by what they are called."""


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="A recipe, or words to search for, in any spelling", show_default="list all"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON")] = False,
) -> None:
    """List the named recipes by what they are for; with a name, show its formula, settings, source and page."""
    found = list(catalogue()) if name is None else _found(name)
    if as_json:
        print(json.dumps([{"name": each, **asdict(catalogue()[each])} for each in found], indent=2))
    elif name is not None and len(found) == 1:
        print("\n".join(_described(found[0], catalogue()[found[0]])))
    else:
        print("\n".join(_listed(found)))


def _found(words: str) -> list[str]:
    if (exact := name_of(words)) is not None:
        return [exact]
    plain = "".join(filter(str.isalnum, words.lower()))
    for options, names in ELSEWHERE.items():
        if plain in names:
            raise ValueError(f"{words} is no recipe; moeify train has it as {options}")
    if not (found := search(words)):
        raise ValueError(f"no recipe is called or mentions {words!r}; {suggest(words, list(catalogue()))}")
    return found


def _listed(names: list[str]) -> Iterator[str]:
    entries = {name: catalogue()[name] for name in names}
    for use, heading in USES.items():
        of_use = {name: entry for name, entry in entries.items() if entry.use == use}
        if of_use:
            yield heading
            yield from (f"  {name + '*' * (not entry.causal):17} {entry.line}" for name, entry in of_use.items())
    if not all(entry.causal for entry in entries.values()):
        yield "* reads later tokens: not for decoders"
    yield "moeify recipes NAME shows formula, settings, source and page"


def _described(name: str, entry: Entry) -> Iterator[str]:
    yield f"{entry.title}: {entry.line}"
    yield ""
    yield from (f"    {line}" for line in entry.formula)
    yield ""
    rows = {
        "use it as": f"--recipe {name}, or moeify.sparsify.recipes[{name!r}]",
        "for decoders": "yes" if entry.causal else "no: it reads later tokens",
        "layout of": entry.family,
        "train with": entry.training,
        "source": entry.source,
        "page": f"docs/methods/{entry.page}.md",
        "settings": "",
    }
    for heading, text in rows.items():
        if text is not None:
            yield from textwrap.wrap(f"{heading:13} {text}", 80, subsequent_indent=" " * 14) or [heading]
    yield from (f"    {key} = {value}" for key, value in _flat(entry.recipe))


def _flat(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their dotted names; a part's name is the value of the part."""
    for key, value in settings.items():
        dotted = above.removesuffix(".") if key == "name" else above + key
        if isinstance(value, dict):
            yield from _flat(value, f"{dotted}.")
        else:
            yield dotted, json.dumps(value)
