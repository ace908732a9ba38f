"""The registry: names of functions and classes, for JSON files and the command line only.

Code passes the function or class itself; names exist for files and the command line, which cannot.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import NoneType
from typing import Any

_BY_NAME: dict[str, dict[str, Callable]] = {}
_LEADING = {"router": 2, "experts": 2, "shared": 2, "memory": 2, "after": 2, "where": 1}
"""The number of leading arguments that parts of each kind are called with, which a file therefore cannot set."""
_FORMER_NAMES = {
    "router": {"once": "shared_routing", "given": "input_weights"},
    "expert_groups": {"groups": "expert_groups"},
}
_FORMER_VALUES = {"router": {("per", "group"): "sequence"}}
_FORMER_OPTIONS = {"router": {"groups": "expert_groups", "silent": "zero_experts"}}
"""Former names of parts, options and values in files of earlier versions, by kind."""


def register(kind: str, name: str) -> Callable[[Any], Any]:
    """Decorate a function or class to give it the name that files and the command line use for it.

    Raises:
        ValueError: the name is taken by something else of the same kind.
    """

    def give_name(thing: Any) -> Any:
        taken = _BY_NAME.setdefault(kind, {}).setdefault(name, thing)
        if taken is not thing:
            raise ValueError(f"the {kind} name {name!r} already means {taken!r}; choose another name")
        return thing

    return give_name


def names(kind: str) -> list[str]:
    """Every registered name of one kind, sorted."""
    return sorted(_BY_NAME.get(kind, {}))


def lookup(kind: str, name: str) -> Callable:
    """The function or class with a registered name.

    Raises:
        ValueError: no such name; the message lists the nearest ones.
    """
    try:
        return _BY_NAME[kind][name]
    except KeyError:
        raise ValueError(f"no {kind} is called {name!r}; {suggest(name, names(kind))}") from None


def suggest(name: str, known: list[str]) -> str:
    """Known names that resemble `name`, for an error message."""
    near = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are: {', '.join(known) or 'none'}"


def _name_of(kind: str, thing: Any) -> str:
    for name, registered in _BY_NAME.get(kind, {}).items():
        if registered is thing:
            return name
    raise ValueError(
        f"{thing!r} has no name, so a file cannot refer to it; "
        f"give it one with @moeify.register({kind!r}, 'a-name'), or pass the recipe in code"
    )


def encode(kind: str, thing: Any) -> Any:
    """Write a registered callable, a partial of one, or an instance of a registered dataclass as plain JSON values.

    Of a dataclass, only the fields that are compared and differ from their defaults are written.
    """
    if isinstance(thing, partial):
        by_position = dict(zip(inspect.signature(thing.func).parameters, thing.args, strict=False))
        return {"name": _name_of(kind, thing.func), **dict(_encode_options(by_position | thing.keywords))}
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        values = {field: getattr(thing, field.name) for field in dataclasses.fields(thing) if field.compare}
        options = {field.name: value for field, value in values.items() if value != field.default}
        return {"name": _name_of(kind, type(thing)), **dict(_encode_options(options))}
    return _name_of(kind, thing)


def _encode_options(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        yield key, encode(key, value) if callable(value) else value


def decode(kind: str, value: Any) -> Any:
    """The inverse of `encode`: a name, or a mapping of a name and its options.

    An option whose own key is a kind (`score`, `expert_groups`, ...) may again be a name or a mapping. Names and
    options of earlier versions are understood.

    Raises:
        ValueError: an unknown name; options that the named thing does not take, of another type than it takes, or
            missing; mappings nested too deeply.
    """
    return _decode(kind, value, 0)


_DEEPEST = 16
"""The deepest nesting of parts; no router wraps more than a few others."""


def _decode(kind: str, value: Any, depth: int) -> Any:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"{kind} must be a name or a mapping with a 'name', got {str(value)[:200]}")
    if depth > _DEEPEST:
        raise ValueError(f"{kind} is nested in more than {_DEEPEST} others; the file is damaged")
    name, written = value["name"], {key: option for key, option in value.items() if key != "name"}
    if name not in _BY_NAME.get(kind, {}):
        name = _FORMER_NAMES.get(kind, {}).get(name, name)
    thing = lookup(kind, name)
    options = {
        key: _decode(key, option, depth + 1) if key in _BY_NAME and isinstance(option, str | dict) else option
        for key, option in _renamed(kind, thing, written).items()
    }
    _check_options(kind, name, thing, options)
    if isinstance(thing, type) and dataclasses.is_dataclass(thing):
        return thing(**options)
    return partial(thing, **options) if options else thing


def settings(kind: str, written: Any) -> dict[str, Any]:
    """Every setting of a registered part by its dotted name, with defaults for those that were not given.

    Args:
        kind: the kind of the part, such as `router`; the part's name is the value of this key.
        written: a name, or a mapping of a name and its options, as `encode` writes.
    """
    written = {"name": written} if isinstance(written, str) else written
    thing = lookup(kind, written["name"])
    parameters = inspect.signature(thing).parameters
    found = {kind: written["name"]}
    for option in _options_of(kind, thing):
        value = written.get(option, parameters[option].default)
        if value is inspect.Parameter.empty:  # what the thing is called with
            continue
        value = encode(option, value) if callable(value) else value
        is_part = option in _BY_NAME and isinstance(value, str | dict)
        found |= {f"{kind}.{name}": v for name, v in (settings(option, value) if is_part else {option: value}).items()}
    return found


def _options_of(kind: str, thing: Callable) -> list[str]:
    return list(inspect.signature(thing).parameters)[_LEADING.get(kind, 0) :]


def _renamed(kind: str, thing: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """The options with former names replaced by the current ones, and former values too where the part is moeify's."""
    known, former, values = _options_of(kind, thing), _FORMER_OPTIONS.get(kind, {}), _FORMER_VALUES.get(kind, {})
    named = {key if key in known else former.get(key, key): option for key, option in options.items()}
    if not thing.__module__.startswith("moeify."):
        return named
    return {key: values.get((key, v), v) if isinstance(v, str) else v for key, v in named.items()}


def _check_options(kind: str, name: str, thing: Callable, options: dict[str, Any]) -> None:
    known = _options_of(kind, thing)
    parameters = inspect.signature(thing).parameters
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{kind} {name!r} has no option {key!r}; {suggest(key, known)}")
        if (needed := _other_type(key, value, parameters[key].annotation)) is not None:
            raise ValueError(f"{kind} {name!r} needs {needed} as {key}, and not {value!r}")
    if kind in _LEADING or dataclasses.is_dataclass(thing):
        for key in known:
            is_needed = parameters[key].default is inspect.Parameter.empty
            if is_needed and parameters[key].kind not in _VARIADIC and key not in options:
                raise ValueError(f"{kind} {name!r} needs the option {key!r}")


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
    "None": ((NoneType,), "nothing"),
    "Sequence[float]": ((list,), "a list"),
    "Sequence[str]": ((list,), "a list"),
}
"""The JSON types of each type of option, and their names in messages."""


def _other_type(key: str, value: Any, annotation: Any) -> str | None:
    """The name of the type that an option must have, if its value has another; unchecked without a JSON form."""
    if key in _BY_NAME:
        return None if callable(value) or value is None or dataclasses.is_dataclass(value) else "a name or a mapping"
    stated = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kinds = stated.split(" | ")
    if not all(kind in _TYPES for kind in kinds):
        return None
    is_bool = isinstance(value, bool)
    if any(isinstance(value, _TYPES[kind][0]) and (not is_bool or kind == "bool") for kind in kinds):
        return None
    return " or ".join(_TYPES[kind][1] for kind in kinds)
