"""What a check of a model can say: a finding with its cause, its evidence and its fix, or why it cannot tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong with a model or with the way it is trained.

    Attributes:
        layer: the name of the layer; empty where it is the model or its training as a whole.
        cause: what is wrong, in one sentence.
        evidence: what was measured, with numbers.
        fix: what to do about it.
        fault: the name of the function that found it; `diagnose` writes it.
    """

    layer: str = ""
    cause: str
    evidence: str
    fix: str
    fault: str = ""


class Unknown(Exception):
    """What was observed does not decide whether the fault is there; the message says what is missing."""


class Unasked(Exception):
    """The fault lies in what was not shown, the training or the model behind a trace; the message says which."""


class Inapplicable(Exception):
    """The model has nothing that could have the fault; the message says what it lacks."""
