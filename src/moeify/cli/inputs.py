"""The model that `inspect`, `trace` and `doctor` look into, and what they run it on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.cli import options as o

if TYPE_CHECKING:
    from moeify.evaluate.objective import Samples
    from moeify.tasks.base import Setup

JOB = "job.json"
"""The settings of a run of `moeify train`, in its folder."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much a model is run on.

    Attributes:
        tokens: about how many, or None.
        per_domain: how many samples of each domain, if there is no number of tokens.
        length: tokens of a text.
        batch: samples at once.
    """

    tokens: int | None = None
    per_domain: int = 16
    length: int = 128
    batch: int = 8


def load_source(source: str, architecture: str | None = None, device: str | None = None) -> Any:
    """A model in a folder or of the hub, in the class that its config names."""
    import torch

    from moeify.folders import model_folder
    from moeify.tasks.models import architecture_of, load_dense, load_model

    o.check_device(device)

    folder = model_folder(Path(source))
    if (folder / "config.json").is_file():
        model = load_model(folder, architecture)
    else:
        model = load_dense(source, architecture or architecture_of(source), dtype="auto")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def read_inputs(
    source: Path | str, data: str | None, probe: str | None, amount: Amount, *, labels: bool = True
) -> tuple[list[Any], Any]:
    """The batches that a model is run on, with the `domain` of each row, and the tokenizer of their ids or None.

    A probe is taken as it is. A run of `moeify train` reads what was held out of its training, whatever its task, and
    what it was trained on where that is too little. Other models read texts.

    Args:
        source: the folder of a run or of a model, or the name of a model of the hub.
        data: other data than the run's, or than the text that came with Python and torch.
        probe: the file or function of a probe.
        amount: how much of it.
        labels: whether the samples of a run keep their labels, which neither generation nor a streamed model takes.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: a model without a tokenizer, or data that do not fit.
    """
    folder = Path(source)
    if probe is not None:
        given = o.choose_probe(probe)
        return (given if isinstance(given, list) else [given]), None
    job = _job(folder)
    if job is None or job["task"] == "lm":
        own = {} if job is None or data is not None else job
        return _of_texts(folder, amount, data or own.get("data"), own.get("text", "text"))
    batches = _of_run(_setup(job, data), amount)
    tokenizer = None
    with suppress(ValueError):
        tokenizer = _tokenizer(folder)
    return [{k: v for k, v in batch.items() if labels or k != "labels"} for batch in batches], tokenizer


def _of_run(setup: Setup, amount: Amount) -> list[dict[str, Any]]:
    held_out, training = setup.validation, setup.train
    if amount.tokens is None:
        picked = [(held_out, i) for i in _in_turn(held_out, amount.per_domain)]
    else:
        count = max(1, amount.tokens // held_out.length)
        parts = (((part, i) for i in _in_turn(part, count)) for part in (held_out, training))
        picked = list(islice(chain.from_iterable(parts), count))
    chunks = [picked[start : start + amount.batch] for start in range(0, len(picked), amount.batch)]
    collate = setup.objective.collate
    return [
        dict(collate([part[i] for part, i in chunk])) | {"domain": [part.domain_of(i) for part, i in chunk]}
        for chunk in chunks
    ]


def _in_turn(samples: Samples, most: int) -> Iterator[int]:
    """The indices of up to `most` samples of every domain, evenly spread over it, one of each domain after another."""
    members: dict[str, list[int]] = {}
    for i in range(len(samples)):
        members.setdefault(samples.domain_of(i), []).append(i)
    kept = [places[:: max(1, len(places) // most)][:most] for places in members.values()]
    return (i for turn in zip_longest(*kept) for i in turn if i is not None)


def _setup(job: dict[str, Any], data: str | None) -> Setup:
    from moeify.tasks import find_task
    from moeify.tasks.base import Shape

    kind = find_task(job["task"])
    shape = Shape(**{each.name: job[each.name] for each in fields(Shape) if each.name in job})
    settings = {each.name: job[each.name] for each in fields(kind) if each.name in job}
    try:
        return kind(**settings | {"shape": shape}).prepare(job["model"], data or job["data"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name other data by --data, or inputs by --probe") from None


def _job(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that a folder, or the model in it, is of; None if it is of none."""
    from moeify.files import read_json

    places = [folder / JOB, *([folder.parent / JOB] if folder.name == "model" else [])]
    found: dict[str, Any] = next((read_json(file) for file in places if file.is_file()), {})
    return found if {"task", "model", "data"} <= found.keys() else None


def _of_texts(folder: Path, amount: Amount, data: str | None, field: str = "text") -> tuple[list[dict[str, Any]], Any]:
    from moeify.data.corpus import build_corpus
    from moeify.data.excerpts import excerpts
    from moeify.data.text import read_texts

    try:
        tokenizer = _tokenizer(folder)
    except ValueError as error:
        raise ValueError(f"{error}; give other inputs than text by --probe") from None
    texts = build_corpus() if data is None else read_texts(data, field=field)
    domains = len({*texts.validation, *texts.train})
    tokens = amount.tokens or amount.per_domain * amount.length * domains
    return excerpts(texts, tokenizer, tokens, length=amount.length, batch=amount.batch), tokenizer


def _tokenizer(folder: Path) -> Any:
    from moeify.folders import model_folder
    from moeify.tasks.models import saved_tokenizer

    return saved_tokenizer(model_folder(folder))
