"""Read text and JSON files within limits: refuse compressed files that expand too far, and JSON nested too deeply."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

MAX_BYTES, MAX_RATIO = 2**28, 50
"""A compressed file may expand to 256 MiB, or to 50 times its size if that is more; text seldom shrinks to a tenth."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, decompressed if its name ends with `.gz`.

    Raises:
        ValueError: not UTF-8, not gzip, or more than the limit.
    """
    try:
        data = _decompress(path) if path.suffix.lower() == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (at byte {error.start}); convert it or leave it out") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}); the file is damaged or not gzip") from error


def byte_limit(path: Path) -> int:
    """The number of bytes that a compressed file may expand to."""
    return max(MAX_BYTES, MAX_RATIO * path.stat().st_size)


def expands_too_far(path: Path) -> ValueError:
    """The error for a file that expands to more."""
    return ValueError(
        f"{path} of {path.stat().st_size:,} bytes expands to more than {byte_limit(path):,} bytes; leave it out "
        "or, if this is intended, decompress it yourself and name the decompressed file"
    )


def _decompress(path: Path) -> bytes:
    with gzip.open(path) as file:
        data = file.read(byte_limit(path) + 1)
    if len(data) > byte_limit(path):
        raise expands_too_far(path)
    return data


def parse_json(text: str, where: str, first_line: int = 1) -> Any:
    """The value of a JSON text.

    Args:
        text: the JSON.
        where: the name of the file in messages.
        first_line: the number that the text's first line has in it.

    Raises:
        json.JSONDecodeError: not JSON.
        ValueError: nested too deeply, or an integer of thousands of digits; the message names file and line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        reason, place = "is nested too deeply", _deepest(text)
    except ValueError as error:  # Python's limit on the digits of an integer
        reason, place = f"cannot be read ({error})", _long_number(text)
    line = first_line + text.count("\n", 0, place)
    raise ValueError(f"{where}, line {line} {reason}; repair it, or leave it out")


_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')


def _deepest(text: str) -> int:
    depth = deepest = place = 0
    for token in _TOKENS.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > deepest:
            deepest, place = depth, token.start()
    return place


def _long_number(text: str) -> int:
    return max(re.finditer(r"\d+", text), key=lambda digits: len(digits[0])).start()
