"""What experts may specialise in, as numbers of groups: domain, modality, script, position, phase, the token itself."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from moeify.inspect.panels.charts import visible
from moeify.inspect.trace import Tokens

_POSITIONS = (0, 1, 4, 16, 64, 256, 1024)
_FREQUENT = 32


@dataclass(frozen=True)
class Groups:
    """A partition of tokens.

    Attributes:
        names: of the groups.
        of: the group of every token, -1 where it has none.
    """

    names: tuple[str, ...]
    of: Int[Tensor, "T"]


def attributes(tokens: Tokens) -> dict[str, Groups]:
    """The partitions in the table that have two groups or more."""
    found: dict[str, Groups] = {}
    if tokens.domain is not None:
        found["domain"] = Groups(tokens.domains, tokens.domain.long())
    if tokens.modality is not None:
        found["modality"] = Groups(tokens.modalities, tokens.modality.long())
    if tokens.phase is not None:
        found["phase"] = Groups(("prefill", "decoding"), tokens.phase.long())
    if tokens.ids is not None and tokens.vocabulary:
        found["script"] = _scripts(tokens)
    if tokens.position is not None:
        found["position"] = _positions(tokens.position)
    if tokens.ids is not None:
        found["token"] = _frequent(tokens)
    return {name: kept for name, groups in found.items() if len((kept := _occurring(groups)).names) > 1}


def script_of(text: str) -> str:
    """The script of the first letter, such as Latin or Cyrillic, which separates many languages; else its category."""
    for c in text:
        if c.isalpha():
            return unicodedata.name(c, "other letters").split()[0].capitalize()
    if any(c.isdigit() for c in text):
        return "digits"
    return "spaces" if text.isspace() or not text else "punctuation"


def quoted(tokens: Tokens, number: int) -> str:
    """The text of a token in quotation marks, control characters as escapes; its number where that tells nothing.

    Tokens that are parts of a character, such as single bytes, all have the text "\ufffd".
    """
    text = tokens.vocabulary.get(number)
    return f"id {number}" if text is None or set(text) == {"\ufffd"} else f"‘{visible(repr(text)[1:-1])}’"


def _scripts(tokens: Tokens) -> Groups:
    script = {number: script_of(text) for number, text in tokens.vocabulary.items()}
    names = tuple(dict.fromkeys(script.values()))
    assert tokens.ids is not None
    return Groups(names, torch.tensor([names.index(script[i]) if i in script else -1 for i in tokens.ids.tolist()]))


def _positions(position: Int[Tensor, "T"]) -> Groups:
    starts = torch.tensor(_POSITIONS)
    names = [f"{a}" if b - a == 1 else f"{a} to {b - 1}" for a, b in pairwise(_POSITIONS)]
    return Groups((*names, f"{_POSITIONS[-1]} on"), torch.searchsorted(starts, position.long(), right=True) - 1)


def _frequent(tokens: Tokens) -> Groups:
    """The most frequent tokens, one group each; the others are omitted."""
    assert tokens.ids is not None
    ids, place, counts = tokens.ids.long().unique(return_inverse=True, return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:_FREQUENT]
    group = torch.full((len(ids),), -1)
    group[most] = torch.arange(len(most))
    names = tuple(quoted(tokens, int(i)) for i in ids[most])
    return Groups(names, group[place])


def _occurring(groups: Groups) -> Groups:
    """Without groups that no token has."""
    used = [i for i in range(len(groups.names)) if bool((groups.of == i).any())]
    new = torch.full((len(groups.names) + 1,), -1)
    new[used] = torch.arange(len(used))
    return Groups(tuple(groups.names[i] for i in used), new[groups.of])
