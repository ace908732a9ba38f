"""Options from a file: YAML, TOML or JSON, by their names on the command line, whose own options override the file."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from moeify.registry import suggest

PAIRS = {"set": "settings", "loss": "losses"}
"""Options that may be repeated as NAME=VALUE, and the attributes that hold them; a file has a mapping for each."""

OF_A_CALL = ("config", "print_config", "resume")
"""Attributes that say what to do now, and are no part of a file."""


def read(context: typer.Context, path: Path | None) -> Path | None:
    """Let the options of a file be the defaults of a command; called before its other options are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that cannot be read, or a key that is no option; the message suggests the nearest.
    """
    if path is None:
        return None
    known = {
        option.opts[0].lstrip("-").replace("-", "_"): str(option.name)
        for option in context.command.params
        if option.name not in (*OF_A_CALL, "help")
    }
    defaults = {}
    for key, value in _parsed(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path} has the key {key!r}, which is no option; {suggest(name, list(known))}")
        if value is not None:
            defaults[known[name]] = _pairs(path, name, value) if name in PAIRS else value
    context.default_map = defaults
    return path


def _pairs(path: Path, name: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} is a mapping of names to values, not {value!r:.60}")
    return [f"{key}={_text(each)}" for key, each in value.items()]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parsed(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to read options from")
    try:
        found = _READERS[path.suffix.lower()](path.read_text(encoding="utf-8"))
    except KeyError:
        raise ValueError(f"{path} is none of {', '.join(_READERS)}, which options are read from") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no options; it should have lines such as steps: 400")
    return found


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


_READERS = {".yaml": _yaml, ".yml": _yaml, ".toml": tomllib.loads, ".json": json.loads}


def written(options: Any) -> str:
    """The options of a command, a dataclass, as a YAML file that gives the same job."""
    import yaml

    repeated = {attribute: name for name, attribute in PAIRS.items()}
    found: dict[str, Any] = {}
    for each in fields(options):
        value = getattr(options, each.name)
        if value is None or each.name in OF_A_CALL:
            continue
        if each.name in repeated:
            found[repeated[each.name]] = dict(text.split("=", 1) for text in value)
        else:
            found[each.name] = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
