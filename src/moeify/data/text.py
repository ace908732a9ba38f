"""From what the user names (a file, a folder, a data set on the hub) to blocks of tokens."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from .corpus import Corpus

Documents = dict[str, list[str]]
"""domain -> its documents."""

PARTS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
"""The part that a file or split named like this belongs to; `test` and all others belong to none."""

FORMATS = (".txt", ".md", ".jsonl", ".parquet", ".gz")
"""Endings of data files; a source with one of them is never sought on the hub."""


@dataclass(frozen=True)
class Texts:
    """Documents by domain, to train on and held out."""

    train: Documents
    validation: Documents = field(default_factory=dict)


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of Hugging Face have it."""

    def encode(self, text: str, /) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, token_ids: list[int], /) -> Any:
        """Return the text of token ids."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte, and two more: end of text and padding."""

    eos_token_id = 256
    pad_token_id = 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text."""
        return list(text.encode(errors="replace"))

    def decode(self, token_ids: Iterable[int] | Int[Tensor, "_"]) -> str:
        """Return the text of the bytes; what is not UTF-8 becomes `\N{REPLACEMENT CHARACTER}`."""
        return bytes(i for i in map(int, token_ids) if i < 256).decode(errors="replace")


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of `length` tokens that do not overlap, cut from one stream of tokens per domain.

    A domain has as many blocks as its size gives, so a shuffling sampler mixes the domains in proportion to their
    sizes. What is left at the end of a stream is not used. `domains` are the names, in the order of the blocks.
    """

    def __init__(self, tokens: Mapping[str, Int[Tensor, "_"]], length: int) -> None:
        cut = [stream[: len(stream) // length * length].view(-1, length) for stream in tokens.values()]
        self.length = length
        self.domains = tuple(tokens)
        self.input_ids = torch.cat(cut)  # (blocks, length)
        self.domain = torch.repeat_interleave(torch.tensor([len(blocks) for blocks in cut]))  # (blocks,)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels` (length,), int64; the model is to shift the labels."""
        ids = self.input_ids[index].long()
        return {"input_ids": ids, "labels": ids.clone()}

    def domain_of(self, index: int) -> str:
        """Return the name of the domain that a block was cut from."""
        return self.domains[int(self.domain[index])]


def blocks(texts: Corpus | Texts, tokenizer: Tokenizer, length: int) -> tuple[Blocks, Blocks]:
    """Return the train and the validation blocks; each document ends with the tokenizer's end of text, if it has one.

    Raises ValueError if a part has no block.
    """

    def part(name: str, domains: Mapping[str, bytes | Sequence[str]]) -> Blocks:
        tokens = {domain: _stream(_documents(documents), tokenizer) for domain, documents in domains.items()}
        longest = max(map(len, tokens.values()), default=0)
        if longest < length:
            raise ValueError(
                f"the {name} part has {longest} tokens in its largest domain, too few for a block of {length}; "
                f"give more text, or a length of at most {longest}"
            )
        return Blocks(tokens, length)

    return part("train", texts.train), part("validation", texts.validation)


def _documents(documents: bytes | Sequence[str]) -> Sequence[str]:
    return [documents.decode()] if isinstance(documents, bytes) else documents


def _stream(documents: Sequence[str], tokenizer: Tokenizer) -> Int[Tensor, "_"]:
    eos = getattr(tokenizer, "eos_token_id", None)
    end = [] if eos is None else [eos]
    encoded = (tokenizer.encode(text) + end for text in documents)
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in chain([[]], encoded)])  # [] for no documents


def held_out(documents: Documents) -> Texts:
    """Hold out the tenth of each domain whose documents have the smallest hashes, at least one.

    A domain that is one document is cut into twenty pieces first. Equal documents are always in the same part.
    """
    texts = Texts({}, {})
    for domain, whole in documents.items():
        pieces = whole if len(whole) > 1 else _pieces(whole[0], 20)
        hashes = [hashlib.sha256(piece.encode(errors="replace")).digest() for piece in pieces]
        limit = sorted(hashes)[max(1, len(hashes) // 10) - 1]
        texts.train[domain] = [piece for piece, own in zip(pieces, hashes, strict=True) if own > limit]
        texts.validation[domain] = [piece for piece, own in zip(pieces, hashes, strict=True) if own <= limit]
    return texts


def _pieces(text: str, count: int) -> list[str]:
    size = -(-len(text) // count)
    return [text[start : start + size] for start in range(0, len(text), size)]


def read_texts(source: str | Path) -> Texts:
    """Read a file, a folder, or a data set of the Hugging Face hub (`org/name` or `org/name:config`), whole.

    Files are text or `.jsonl`, plain or `.gz`, and `.parquet`; rows have a field `text` and may have a `domain`.
    Without one the domain is the subfolder, else the name of the source. A folder with data files named `train*` is a
    data set: `validation*` is held out, and what is named otherwise is not read. Every other folder is read in full,
    without hidden and binary files. Where nothing is held out, see `held_out`.

    Raises FileNotFoundError if there is no such source, ValueError if it cannot be read or is empty.
    """
    path = Path(source)
    if path.is_dir():
        texts = _read_folder(path)
    elif path.is_file():
        texts = Texts(_by_domain(_read_file(path, path.name.split(".")[0])))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(source)) and not (path.parent.exists() or _is_format(path)):
        texts = _read_hub(str(source))
    else:
        raise FileNotFoundError(f"no file or folder {source} (a data set of the hub is written org/name)")
    if not texts.train:
        raise ValueError(f"{source} is empty: there is no text to train on")
    return texts if texts.validation else held_out(texts.train)


def _by_domain(documents: Iterable[tuple[str, str]]) -> Documents:
    domains: Documents = {}
    for domain, text in documents:
        if text.strip():
            domains.setdefault(domain, []).append(text)
    return domains


def _is_format(path: Path) -> bool:
    return path.suffix in FORMATS


def _read_folder(folder: Path) -> Texts:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    parts: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in filter(_is_format, files):
        if part := PARTS.get(re.split(r"[-_.]", path.name)[0]):
            parts[part].append(path)
    if not parts["train"]:
        parts = {"train": [path for path in files if not _binary(path)], "validation": []}

    def read(paths: list[Path]) -> Documents:
        return _by_domain(row for path in paths for row in _read_file(path, _domain(path.relative_to(folder), folder)))

    return Texts(read(parts["train"]), read(parts["validation"]))


def _hidden(relative: Path) -> bool:
    return any(name.startswith(".") for name in relative.parts)


def _binary(path: Path) -> bool:
    with path.open("rb") as file:
        return not _is_format(path) and b"\0" in file.read(8000)


def _domain(relative: Path, folder: Path) -> str:
    return relative.parts[0] if len(relative.parts) > 1 else folder.resolve().name


def _read_file(path: Path, domain: str) -> Iterator[tuple[str, str]]:
    """Yield (domain, document)."""
    if path.suffix == ".parquet":
        yield from _rows(_parquet_rows(path), path, domain)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _rows(_json_rows(path), path, domain)
    else:
        yield domain, _text(path)


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (at byte {error.start}); convert it or leave it out") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); the file is damaged or not gzip") from error


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is no object; a line should be {{'text': ...}}")
            yield row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'moeify[data]'") from error
    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error
    _need_text(table.schema_arrow.names, path)
    for batch in table.iter_batches(columns=[name for name in ("text", "domain") if name in table.schema_arrow.names]):
        yield from batch.to_pylist()


def _rows(rows: Iterable[Any], source: object, domain: str) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows, 1):
        _need_text(row, source)
        if not isinstance(row["text"], str):
            raise ValueError(f"{source}, row {number}: the field 'text' is a {type(row['text']).__name__}, not a text")
        yield str(row.get("domain") or domain), row["text"]


def _need_text(fields: Iterable[str], source: object) -> None:
    if "text" not in fields:
        raise ValueError(f"{source} has no field 'text', it has: {', '.join(fields)}; rename the one to read")


def _read_hub(source: str) -> Texts:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"no file or folder {source}; the hub needs datasets: pip install 'moeify[data]'") from error
    name, _, config = source.partition(":")
    try:
        splits = {str(split): rows for split, rows in datasets.load_dataset(name, config or None).items()}
    except Exception as error:  # offline, not found, not readable: datasets has a class for each
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"no file or folder {source}, and the hub did not give it: {reason}") from error
    parts = {PARTS[split]: _by_domain(_rows(rows, source, name)) for split, rows in splits.items() if split in PARTS}
    if "train" not in parts:
        raise ValueError(f"{source} has no split 'train', it has: {', '.join(splits)}")
    return Texts(**parts)
