"""Find the files that claims and benchmarks are measured on, and compare them with their SHA-256."""

import csv
import hashlib
from functools import cache
from pathlib import Path

from moeify import env


def data_file(relative: str) -> Path:
    """Return the path of a file of the data folder, with size and SHA-256 as in its MANIFEST.tsv.

    The folder is what MOEIFY_DATA names; a file is checked once per process.

    Raises:
        FileNotFoundError: MOEIFY_DATA is not set, or the file is not there.
        ValueError: it is another file.
    """
    if env.DATA.path is None:
        raise FileNotFoundError(f"{relative} is a file of the data folder; set MOEIFY_DATA to the path of that folder")
    return _checked(env.DATA.path, relative)


@cache
def _checked(folder: Path, relative: str) -> Path:
    path, manifest = folder / relative, folder / "MANIFEST.tsv"
    if not (path.is_file() and manifest.is_file()):
        raise FileNotFoundError(f"the data folder has no {relative} or no {manifest.name}; MOEIFY_DATA is {folder}")
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file, delimiter="\t")}
    if relative not in rows:
        raise ValueError(f"{relative} is not listed in {manifest}; only listed files can be used")
    expected = (int(rows[relative]["bytes"]), rows[relative]["sha256"])
    data = path.read_bytes()
    found = (len(data), hashlib.sha256(data).hexdigest())
    if found != expected:
        raise ValueError(
            f"{path} has {found[0]} bytes and sha256 {found[1]}, not {expected[0]} and {expected[1]}; get it again"
        )
    return path
