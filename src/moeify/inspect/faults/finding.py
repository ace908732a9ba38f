"""Results of a check: a finding with its cause, its evidence and its fix, or the reason why it could not decide."""

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
    """The observations do not decide whether the model has the fault; the message names what is missing."""


class NotGiven(Exception):
    """The check needs an input that was not given, such as a trainer or a model; the message names it."""


class Inapplicable(Exception):
    """The model has no part that could have the fault; the message names the part."""
