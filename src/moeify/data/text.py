"""Read a file, a folder or a data set of the hub as training and held-out documents."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from moeify.data.fields import NoTextField
from moeify.data.hub import SAVED, is_saved, named_splits
from moeify.data.rows import Document, documents, format_of, is_data, read_file
from moeify.progress import Progress

Documents = dict[str, list[str]]
"""domain -> its documents."""

PARTS = {"train": "train"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval", "evaluation", "heldout"), "validation"
)
"""The part that a file or split named like this belongs to; `test` and all others belong to none."""


@dataclass(frozen=True)
class Texts:
    """Training and held-out documents, by domain.

    Attributes:
        train: domain -> documents.
        validation: domain -> documents.
        skipped: files that were not read, or only without a few bad rows -> why.
    """

    train: Documents
    validation: Documents = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict, compare=False)


def held_out(documents: Documents) -> Texts:
    """Hold out a tenth of the documents of each domain, those with the smallest hashes, at least one.

    A domain that is one document is cut into twenty pieces first. Equal documents are always in the same part; a domain
    of equal documents alone is not held out.
    """
    texts = Texts({}, {})
    for domain, whole in documents.items():
        pieces = whole if len(whole) > 1 else _pieces(whole[0], 20)
        chosen = _chosen(Counter(pieces), max(1, len(pieces) // 10))
        texts.train[domain] = [piece for piece in pieces if piece not in chosen]
        if chosen:
            texts.validation[domain] = [piece for piece in pieces if piece in chosen]
    return texts


def _chosen(copies: Counter[str], size: int) -> set[str]:
    """Documents with the smallest hashes that are `size` together with their copies, or the one with fewest copies."""
    if len(copies) < 2:
        return set()
    by_hash = sorted(copies, key=lambda piece: hashlib.sha256(piece.encode(errors="replace")).digest())
    chosen: set[str] = set()
    for piece in by_hash:
        if copies[piece] <= size:
            chosen.add(piece)
            size -= copies[piece]
    return chosen or {min(by_hash, key=lambda piece: copies[piece])}


def _pieces(text: str, count: int) -> list[str]:
    size = -(-len(text) // count)
    return [text[start : start + size] for start in range(0, len(text), size)]


def read_texts(source: str | Path, *, field: str = "text") -> Texts:
    """Read a file, a folder, or a data set of the Hugging Face hub (`org/name` or `org/name:config`), whole.

    Files are text, `.jsonl` or `.ndjson`, `.json`, `.csv` or `.tsv`, plain or `.gz`, and `.parquet`; a folder may be
    what `save_to_disk` of the library datasets wrote. Rows have a text, or messages, which are joined (`user: ...`),
    and may have a `domain`, or a `language` in its place. Without one the domain is the subfolder, else the name of
    the source. A folder with data files named `train*`, or with the folders `train` and `validation`, is a data set:
    `validation*`, `valid*`, `val*`, `dev*` and `eval*` are held out, and other files are not read. Every other folder
    is read in full, without hidden and binary files, and without `.json` that holds no text; a warning names what was
    skipped. One bad row in a thousand is skipped too, and counted. Where nothing is held out, see `held_out`. Steps of
    more than ten seconds print the time that is left.

    Args:
        source: what to read.
        field: the field of a row that is its text.

    Raises:
        FileNotFoundError: there is no such source.
        ImportError: parquet, the hub or a saved data set, without the library that reads it.
        ValueError: a source that cannot be read or is empty, more bad rows, or a compressed file that expands to more
            than 256 MiB and fifty times its size; the message names the file and the row.
    """
    path = Path(source)
    if (splits := named_splits(source)) is not None:
        name = path.resolve().name if path.is_dir() else str(source).partition(":")[0]
        texts = _read_splits(splits, str(source), name, field)
    else:
        texts = _read_folder(path, field) if path.is_dir() else _read_alone(path, field)
    if not texts.train:
        reasons = "".join(f"; {name} was not read: {why}" for name, why in texts.skipped.items())
        raise ValueError(f"{source} is empty: there is no text to train on{reasons}")
    if texts.skipped:
        files = ", ".join(f"{name} ({why})" for name, why in texts.skipped.items())
        logging.getLogger(__name__).warning("%s: not read, or not whole: %s", source, files)
    if texts.validation:
        return texts
    split = held_out(texts.train)
    return Texts(split.train, split.validation, texts.skipped)


def _by_domain(found: Iterable[Document]) -> Documents:
    domains: Documents = {}
    for domain, text in found:
        if text.strip():
            domains.setdefault(domain, []).append(text)
    return domains


def _read_alone(path: Path, field: str) -> Texts:
    skipped: dict[str, str] = {}
    progress = Progress(f"reading {path.name}", 1)
    on_skipped = partial(skipped.__setitem__, path.name)
    found = read_file(path, path.name.split(".")[0], field, on_skipped=on_skipped, on_progress=progress.at)
    return Texts(_by_domain(found), skipped=skipped)


def _read_folder(folder: Path, field: str) -> Texts:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    for path in files:
        if path.name in SAVED and path.parent != folder and is_saved(path.parent):
            raise ValueError(f"{path.parent} is a data set that save_to_disk wrote; read it by itself, not in {folder}")
    split = _split_folders(folder)
    parts: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in filter(is_data, files):
        top = path.relative_to(folder).parts[0].lower() if split else ""
        if part := PARTS.get(top) or PARTS.get(re.split(r"[-_.]", path.name.lower())[0]):
            parts[part].append(path)
    skipped: dict[str, str] = {}
    if parts["train"]:
        used = {*parts["train"], *parts["validation"]}
        skipped |= {_name(path, folder): "it is in no part that is read" for path in files if path not in used}
    else:
        parts = {"train": [path for path in files if not _binary(path)], "validation": []}
        skipped |= {_name(path, folder): "it is binary" for path in files if _binary(path)}

    sizes = {path: path.stat().st_size for part in parts.values() for path in part}
    progress = Progress(f"reading {folder.resolve().name}", sum(sizes.values()))
    done = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))

    def read(path: Path) -> Iterator[Document]:
        relative = path.relative_to(folder)
        inside = Path(*relative.parts[1:]) if split and relative.parts[0].lower() in PARTS else relative
        domain = inside.parts[0] if len(inside.parts) > 1 else folder.resolve().name
        progress.at(done[path])
        try:
            yield from read_file(
                path, domain, field,
                on_skipped=partial(skipped.__setitem__, _name(path, folder)),
                on_progress=lambda share: progress.at(done[path] + share * sizes[path]),
            )  # fmt: skip
        except NoTextField as error:
            if format_of(path) != ".json" or _name(path, folder) in skipped:
                raise
            skipped[_name(path, folder)] = str(error)

    train, validation = (_by_domain(row for path in parts[part] for row in read(path)) for part in parts)
    return Texts(train, validation, skipped)


def _split_folders(folder: Path) -> bool:
    """Whether the parts of a data set are folders of their own."""
    found = {PARTS.get(path.name.lower()) for path in folder.iterdir() if path.is_dir()}
    return {"train", "validation"} <= found


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _hidden(relative: Path) -> bool:
    return any(name.startswith(".") for name in relative.parts)


def _binary(path: Path) -> bool:
    with path.open("rb") as file:
        return not is_data(path) and b"\0" in file.read(8000)


def _read_splits(splits: Mapping[str, Any], source: str, name: str, field: str) -> Texts:
    skipped: dict[str, str] = {}
    parts: dict[str, Documents] = {}
    for split, rows in splits.items():
        if split in PARTS:
            progress, total = Progress(f"reading {name}, {split}", 1), len(rows)
            shared = ((number / total, row) for number, row in enumerate(rows, 1))
            on_skipped = partial(skipped.__setitem__, split)
            found = documents(shared, source, name, field, on_skipped=on_skipped, on_progress=progress.at)
            parts[PARTS[split]] = _by_domain(found)
    if "train" not in parts:
        raise ValueError(f"{source} has no split 'train', it has: {', '.join(splits)}")
    return Texts(parts["train"], parts.get("validation", {}), skipped)
