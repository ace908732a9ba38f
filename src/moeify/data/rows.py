"""Read data files (text, JSON, CSV, parquet) as documents, each with its domain; errors name file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FORMATS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of data files, in lower or upper case, with or without a further `.gz`."""

CHATS = ("messages", "conversations")
"""Fields that may hold a list of messages where a row has no text."""

Document = tuple[str, str]
"""Domain and text."""


class NoText(ValueError):
    """A data file has rows, but none of its fields is the text to read."""


def format_of(path: Path) -> str:
    """The ending that says how a file is read: in lower case, and without `.gz`; "" if it has none."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def is_data(path: Path) -> bool:
    """Whether a file has the ending of a data file."""
    return format_of(path) in FORMATS or path.suffix.lower() == ".gz"


def read_file(path: Path, domain: str, field: str = "text") -> Iterator[Document]:
    """The documents of one file; of rows without a domain of their own it is `domain`.

    Args:
        path: rows in JSON, CSV or parquet by its ending, and one document of text otherwise.
        domain: see above.
        field: the field of a row that is its text.

    Raises:
        ImportError: parquet without pyarrow.
        NoText: rows without the field.
        ValueError: a file that cannot be read. The message names the file, and the row if there are rows.
    """
    if (read := _READERS.get(format_of(path))) is not None:
        yield from documents(read(path, field), path, domain, field)
    else:
        yield domain, _unicode(read_text(path), f"{path}")


def read_text(path: Path) -> str:
    """A file as UTF-8, unpacked if it ends with `.gz`.

    Raises:
        ValueError: not UTF-8, or not gzip.
    """
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (at byte {error.start}); convert it or leave it out") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); the file is damaged or not gzip") from error


def documents(
    rows: Iterable[Mapping[str, Any]], source: object, domain: str, field: str = "text"
) -> Iterator[Document]:
    """The domain and the text of every row; a row without the field may hold messages (a chat), which are joined.

    Args:
        rows: mappings from field to value.
        source: what messages call the rows.
        domain: of rows whose field `domain` is missing or empty.
        field: the text.

    Raises:
        NoText: a row without text and messages.
        ValueError: a text that is no string, or not Unicode. The message names the row.
    """
    for number, row in enumerate(rows, 1):
        own = row.get("domain")
        here = f"{source}, row {number}"
        yield domain if own is None or own == "" else str(own), _unicode(_text_of(row, source, here, field), here)


def _text_of(row: Mapping[str, Any], source: object, here: str, field: str) -> str:
    key = text_field(row, source, field)
    value = row[key]
    if key != field:
        return _chat(value, here)
    if not isinstance(value, str):
        raise ValueError(f"{here}: the field {field!r} is a {type(value).__name__}, not a text")
    return value


def text_field(fields: Iterable[str], source: object, field: str) -> str:
    """The field to read: the one that `field` names, or else messages."""
    names = [str(name) for name in fields]
    if (key := next((name for name in (field, *CHATS) if name in names), None)) is None:
        raise NoText(
            f"{source} has no field {field!r}, it has: {', '.join(names)}; rename the one to read, or name it with "
            "read_texts(..., field=...)"
        )
    return key


def _chat(messages: Any, here: str) -> str:
    """Messages one below the other, each behind the name of its role."""
    if not isinstance(messages, list):
        raise ValueError(f"{here}: messages are a list of {{'role': ..., 'content': ...}}, not {messages!r:.60}")
    lines = []
    for message in messages:
        role, content = (
            next((message[key] for key in keys if key in message), None) if isinstance(message, Mapping) else None
            for keys in (("role", "from"), ("content", "value"))
        )
        if isinstance(content, list):  # parts, of which only text can be read
            content = "\n".join(part["text"] for part in content if isinstance(part, Mapping) and "text" in part)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{here}: a message is {{'role': ..., 'content': ...}}, not {message!r:.60}")
        lines.append(f"{role}: {content}")
    return "\n\n".join(lines)


def _unicode(text: str, here: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{here}: character {error.start} is half of a surrogate pair ({text[error.start]!a}), which no UTF-8 text "
            "has; repair the text, or leave it out"
        ) from None
    return text


def _json_lines(path: Path, field: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is no object; a line should be {{{field!r}: ...}}")
            yield row


def _json(path: Path, field: str) -> Iterator[Mapping[str, Any]]:
    """A list of rows, the only list of rows in an object (`{"data": [...]}`), one row, or a row per line."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, field)
            return
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        is_row = any(name in value for name in (field, *CHATS))
        value = lists[0] if len(lists) == 1 and not is_row else [value]
    if not isinstance(value, list):
        raise NoText(f"{path} holds a {type(value).__name__} and no rows; it should be a list of {{{field!r}: ...}}")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise NoText(f"{path}, row {number} is no object; a row should be {{{field!r}: ...}}")
        yield row


def _csv(path: Path, field: str) -> Iterator[Mapping[str, Any]]:
    table = io.StringIO(read_text(path), newline="")
    limit = csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072
    try:
        rows = csv.DictReader(table, delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
        text_field(rows.fieldnames or (), path, field)
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                raise ValueError(f"{path}, row {number} has not as many fields as the heading; quote texts with commas")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, field: str) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'moeify[data]'") from error
    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error
    names = table.schema_arrow.names
    wanted = {text_field(names, path, field), "domain"}
    for batch in table.iter_batches(columns=[name for name in names if name in wanted]):
        yield from batch.to_pylist()


_READERS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
