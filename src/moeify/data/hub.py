"""Data sets of the library datasets: of the Hugging Face hub, or saved in a folder by `save_to_disk`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeify.data.rows import is_data

SAVED = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` writes into the folder of a data set."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def is_name(source: str) -> bool:
    """Whether a source is written as a data set of the hub, `org/name` or `org/name:config`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) is not None


def named_splits(source: str | Path) -> dict[str, Any] | None:
    """The splits of a data set by name; None for any other file or folder.

    Args:
        source: a folder that `save_to_disk` wrote; or `org/name` or `org/name:config` of the hub, unless there is a
            folder `org`, or the name ends as that of a data file.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ImportError: datasets is not installed.
    """
    path = Path(source)
    if path.is_dir() and is_saved(path):
        return saved_splits(path)
    if path.exists():
        return None
    if is_name(str(source)) and not (path.parent.exists() or is_data(path)):
        return hub_splits(str(source))
    raise FileNotFoundError(f"there is no file or folder {source} (a data set of the hub is written org/name)")


def saved_splits(folder: Path) -> dict[str, Any]:
    """The splits of a saved data set by name; one without splits is `train`.

    Raises:
        ImportError: datasets is not installed.
    """
    loaded = _datasets(folder).load_from_disk(str(folder))
    return {str(split): rows for split, rows in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}


def hub_splits(source: str) -> dict[str, Any]:
    """The splits of a data set of the hub by name.

    Raises:
        FileNotFoundError: the hub does not give it.
        ImportError: datasets is not installed.
    """
    datasets = _datasets(source)
    name, _, config = source.partition(":")
    try:
        return {str(split): rows for split, rows in datasets.load_dataset(name, config or None).items()}
    except Exception as error:  # offline, not found, not readable: datasets has a class for each
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"no file or folder {source}, and the hub did not give it: {reason}") from error


def plain_rows(rows: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a split: classes by their names, images and sounds encoded as they are."""
    names = {}
    for column, feature in (getattr(rows, "features", None) or {}).items():
        if hasattr(feature, "decode") and hasattr(feature, "decode_example"):
            rows = rows.cast_column(column, type(feature)(decode=False))
        elif hasattr(feature, "int2str"):
            names[column] = feature
    for row in rows:
        labelled = {column: feature for column, feature in names.items() if row[column] is not None}
        yield row | {column: feature.int2str(row[column]) for column, feature in labelled.items()}


def _datasets(source: object) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is not a file or folder of data; a data set of the hub, or one that save_to_disk wrote, needs "
            "datasets: pip install 'moeify[data]'"
        ) from error
    return datasets
