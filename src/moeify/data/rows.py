"""Read data files (text, JSON, CSV, parquet) as rows or as documents with a domain; errors name file and row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moeify.data.decompress import byte_limit, expands_too_far, parse_json, read_text
from moeify.data.fields import CHATS, Columns, Fields, NoTextField, TextField, text_field

FORMATS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""File extensions of data files, in lower or upper case, with or without a further `.gz`."""

Document = tuple[str, str]
"""Domain and text."""

Row = tuple[float, Mapping[str, Any] | ValueError]
"""The share of all rows that is read with this one, 0 to 1, and its fields, or why it has none."""

OnSkipped = Callable[[str], None]
OnProgress = Callable[[float], None]

MIN_ROWS_PER_BAD_ROW, MAX_BAD_ROWS = 1000, 1000
"""Bad rows are skipped if they are at most one in `MIN_ROWS_PER_BAD_ROW`, and at most `MAX_BAD_ROWS`."""


def format_of(path: Path) -> str:
    """The file extension that determines the reader: in lower case, without `.gz`; "" if there is none."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def is_data(path: Path) -> bool:
    """Whether a file has the extension of a data file."""
    return format_of(path) in FORMATS or path.suffix.lower() == ".gz"


def read_table(path: Path, columns: Columns) -> list[dict[str, Any]]:
    """The rows of a JSON, CSV or parquet file, each as its columns by name, of text in CSV.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: parquet without pyarrow.
        NoField: rows without one of the needed columns.
        ValueError: another format, or a file that cannot be read; the message names file and row.
    """
    if (read := _READERS.get(format_of(path))) is None:
        raise ValueError(f"{path} holds no table; a table is one of {', '.join(_READERS)}, or of these with .gz")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    rows = []
    for number, (_, row) in enumerate(read(path, columns), 1):
        if isinstance(row, ValueError):
            raise row
        rows.append({name: row[name] for name in columns.among(row, f"{path}, row {number}")})
    return rows


def read_file(
    path: Path,
    domain: str,
    field: str = "text",
    *,
    on_skipped: OnSkipped | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Document]:
    """The documents of one file; of rows without a domain of their own it is `domain`.

    Args:
        path: rows in JSON, CSV or parquet by its extension, and one document of text otherwise.
        domain: see above.
        field: the field of a row that is its text.
        on_skipped: called with the reason if few bad rows among many were skipped, see `documents`.
        on_progress: called with the share of the file that has been read, 0 to 1.

    Raises:
        ImportError: parquet without pyarrow.
        NoTextField: rows without the field.
        ValueError: a file that cannot be read. The message names the file, and the row if there are rows.
    """
    if (read := _READERS.get(format_of(path))) is not None:
        rows = read(path, TextField(field))
        yield from documents(rows, path, domain, field, on_skipped=on_skipped, on_progress=on_progress)
    else:
        yield domain, _unicode(read_text(path), f"{path}")


def documents(
    rows: Iterable[Row],
    source: object,
    domain: str,
    field: str = "text",
    *,
    on_skipped: OnSkipped | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Document]:
    """The domain and the text of every row; a row without the field may hold messages (a chat), which are joined.

    One bad row in a thousand, and at most 1,000 of them, are skipped.

    Args:
        rows: mappings from field to value, or why a row has none, each with the share of all that is read with it.
        source: the name of the rows in messages.
        domain: of rows whose fields `domain` and `language` are missing or empty.
        field: the text.
        on_skipped: called with the reason if bad rows were skipped.
        on_progress: called with the share of the rows that has been read, 0 to 1.

    Raises:
        NoTextField: a row without text and messages.
        ValueError: a text that is no string, or not Unicode; the first bad row, where there are more than the limit.
            The message names the row.
    """
    bad, first, number = 0, None, 0
    for number, (share, row) in enumerate(rows, 1):
        if on_progress is not None:
            on_progress(share)
        try:
            if isinstance(row, ValueError):
                raise row
            document = _document(row, source, number, domain, field)
        except ValueError as error:
            bad, first = bad + 1, first or error
            if bad > MAX_BAD_ROWS:
                break
        else:
            yield document
    if first is not None:
        if bad > MAX_BAD_ROWS or bad * MIN_ROWS_PER_BAD_ROW > number:
            others = f"; {bad:,} of {number:,} rows are bad, and at most one in {MIN_ROWS_PER_BAD_ROW:,} is skipped"
            kind = NoTextField if isinstance(first, NoTextField) else ValueError
            raise kind(f"{first}{others if bad > 1 else ''}") from first
        if on_skipped is not None:
            on_skipped(f"{bad:,} of {number:,} rows were skipped; the first: {first}")


def _document(row: Mapping[str, Any], source: object, number: int, domain: str, field: str) -> Document:
    own = next((row[name] for name in ("domain", "language") if row.get(name) not in (None, "")), domain)
    here = f"{source}, row {number}"
    domain = _unicode(str(own), here)
    return domain, _unicode(_text_of(row, here, field), here)


def _text_of(row: Mapping[str, Any], here: str, field: str) -> str:
    key = text_field(row, here, field)
    value = row[key]
    if key != field:
        return chat(value, here)
    if not isinstance(value, str):
        raise ValueError(f"{here}: the field {field!r} is a {type(value).__name__}, not a text")
    return value


def chat(messages: Any, here: str) -> str:
    """Messages joined by line breaks, each after the name of its role."""
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


def _json_lines(path: Path, fields: Fields) -> Iterator[Row]:
    text = read_text(path)
    start = 0
    for number, line in enumerate(text.split("\n"), 1):
        start += len(line) + 1
        if line.strip():
            yield start / len(text), _json_line(line, path, number, fields.example)


def _json_line(line: str, path: Path, number: int, field: str) -> Mapping[str, Any] | ValueError:
    try:
        row = parse_json(line, str(path), number)
    except json.JSONDecodeError as error:
        return ValueError(f"{path}, line {number} is not JSON: {error}")
    except ValueError as error:
        return error
    if not isinstance(row, dict):
        return ValueError(f"{path}, line {number} is not an object; a line should be {{{field!r}: ...}}")
    return row


def _json(path: Path, fields: Fields) -> Iterator[Row]:
    """A list of rows, the only list of rows in an object (`{"data": [...]}`), one row, or a row per line."""
    try:
        value = parse_json(read_text(path), str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, fields)
            return
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        is_row = any(name in value for name in (fields.example, *CHATS))
        value = lists[0] if len(lists) == 1 and not is_row else [value]
    if not isinstance(value, list):
        raise NoTextField(
            f"{path} holds a {type(value).__name__} and no rows; it should be a list of {{{fields.example!r}: ...}}"
        )
    for number, row in enumerate(value, 1):
        is_object = isinstance(row, dict)
        no_row = f"{path}, row {number} is not an object; a row should be {{{fields.example!r}: ...}}"
        yield number / len(value), row if is_object else NoTextField(no_row)


def _csv(path: Path, fields: Fields) -> Iterator[Row]:
    text = read_text(path)
    table = io.StringIO(text, newline="")
    limit = csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072
    try:
        rows = csv.DictReader(table, delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
        fields.among(rows.fieldnames or (), path)
        for number, row in enumerate(rows, 1):
            fits = None not in row and None not in row.values()
            unfit = f"{path}, row {number} has not as many fields as the heading; quote texts with commas"
            yield table.tell() / len(text), row if fits else ValueError(unfit)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, fields: Fields) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'moeify[data]'") from error
    try:
        table = parquet.ParquetFile(path)
        wanted = fields.among(table.schema_arrow.names, path)
        total, seen, size = table.metadata.num_rows, 0, 0
        if _uncompressed_size(table.metadata, wanted) > byte_limit(path):
            raise expands_too_far(path)
        for batch in table.iter_batches(batch_size=64, columns=wanted):  # one value may stand for all rows of a page
            size += batch.nbytes
            if size > byte_limit(path):
                raise expands_too_far(path)
            for row in _rows(batch, path, seen):
                seen += 1
                yield seen / total, row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error


def _uncompressed_size(metadata: Any, wanted: list[str]) -> int:
    """The bytes that the wanted columns hold uncompressed, by the file's metadata."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] in wanted)


def _rows(batch: Any, path: Path, before: int) -> Iterator[Mapping[str, Any] | ValueError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield ValueError(
                    f"{path}, row {before + i + 1} is not UTF-8 ({error.reason}); repair it, or leave it out"
                )


_READERS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
