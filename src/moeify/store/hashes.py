"""SHA-256 of the files of a saved model, written beside them and compared before they are read: `SHA256.json`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moeify.files import fingerprint, read_json, write_json

HASHES = "SHA256.json"


def write_hashes(folder: Path, files: Iterable[Path]) -> None:
    """Write what the files of a folder are at this moment."""
    write_json(folder / HASHES, {"format": 1, "files": {file.name: fingerprint(file) for file in sorted(files)}})


def verify(folder: str | Path) -> None:
    """Compare every file of a saved model with what `save` wrote.

    Raises:
        FileNotFoundError: the folder has no hashes (earlier versions wrote none), or a file is missing.
        ValueError: a file was damaged or changed; the message names it.
    """
    folder = Path(folder)
    if not (folder / HASHES).is_file():
        raise FileNotFoundError(
            f"there is no {HASHES} in {folder}, so its files cannot be verified; load the model and save it again"
        )
    check(folder, [folder / name for name in _listed(folder)])


def check(folder: Path, files: Iterable[Path]) -> None:
    """Compare those files that are about to be read; folders without hashes, of earlier versions, pass.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file was damaged or changed, or is not listed.
    """
    if not (folder / HASHES).is_file():
        return
    listed = _listed(folder)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file.name} in {folder}, though it was saved")
        if listed.get(file.name) != fingerprint(file):
            raise ValueError(
                f"{file} is damaged: it is not what was saved (SHA-256 differs from {HASHES}); copy it again from "
                f"where it came from, or, if you changed it yourself, delete {HASHES}"
            )


def _listed(folder: Path) -> dict[str, dict]:
    listed = read_json(folder / HASHES).get("files")
    if not isinstance(listed, dict) or any(Path(name).name != name for name in listed):
        raise ValueError(f"{folder / HASHES} is damaged: it lists no files of its folder; delete it to load unchecked")
    return listed
