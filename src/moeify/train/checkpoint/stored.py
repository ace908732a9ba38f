"""Tensors on disk, whole or in pieces over several files, and how each process reads the part of them that it holds.

Reading is by name and index, so those that read need not be as many, nor hold the same parts, as those that wrote.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.files import open_tensors
from moeify.store.dtypes import dtype_of
from moeify.store.reading import weight_files
from moeify.train.checkpoint.shards import boxes

OFFSETS = "DCP_SHARDING_INFO"
"""The entry of a shard's header that holds the first index of each piece, as torch.distributed.checkpoint writes it."""


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor, in a file under the tensor's name.

    Attributes:
        file: where it is.
        start: its first index in the whole tensor.
        shape: its sizes.
    """

    file: Path
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """The index behind its last one, in each dimension."""
        return tuple(first + size for first, size in zip(self.start, self.shape, strict=True))


@dataclass(frozen=True)
class Stored:
    """The headers of tensors on disk.

    Attributes:
        pieces: the parts of each tensor.
        dtypes: the dtype of each tensor; None for one that torch lacks, or where pieces differ.
    """

    pieces: dict[str, list[Piece]]
    dtypes: dict[str, torch.dtype | None]

    @classmethod
    def of(cls, files: Sequence[Path]) -> Stored:
        """Read the headers of safetensors files.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is damaged.
        """
        pieces: dict[str, list[Piece]] = defaultdict(list)
        dtypes: dict[str, torch.dtype | None] = {}
        for file in files:
            with open_tensors(file) as tensors:
                offsets = json.loads((tensors.metadata() or {}).get(OFFSETS, "{}"))
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    header = tensors.get_slice(name)
                    shape, dtype = tuple(header.get_shape()), dtype_of(header.get_dtype())
                    start = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
                    if len(start) != len(shape):
                        raise ValueError(f"{file} is damaged: {name} of {len(shape)} dimensions begins at {start}")
                    if math.prod(shape) or not any(start):  # a process without a part of it writes an empty one
                        pieces[name].append(Piece(file, start, shape))
                    dtypes[name] = dtype if dtypes.get(name, dtype) == dtype else None
        return cls(dict(pieces), dtypes)

    @classmethod
    def of_model(cls, folder: Path) -> Stored:
        """The weights of a checkpoint, sharded or not."""
        shards = sorted((folder / "model").glob("*.safetensors"))
        return cls.of(shards or weight_files(folder))

    @classmethod
    def of_optimizer(cls, folder: Path) -> Stored:
        """The tensors of an optimizer in a checkpoint, sharded or not."""
        whole = folder / "optimizer.safetensors"
        return cls.of([whole] if whole.exists() else sorted((folder / "optimizer").glob("*.safetensors")))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole tensor whose pieces are complete."""
        return tuple(map(max, zip(*(piece.stop for piece in self.pieces[name]), strict=True)))

    def described(self) -> dict[str, list[Any]]:
        """Shape and dtype of each tensor, for a manifest."""
        return {name: describe(self.shape(name), self.dtypes[name]) for name in sorted(self.pieces)}

    def fault(self, expected: Mapping[str, Any]) -> str | None:
        """What of the tensors that a manifest lists is not there, or None if all are, whole and as listed.

        Args:
            expected: `described` of what was saved.
        """
        for name, (shape, dtype) in sorted(expected.items(), key=lambda each: ("expert" not in each[0], each[0])):
            if name not in self.pieces:
                return f"{name} is in none of its files"
            if dtype != str(self.dtypes[name]):
                return f"{name} is {self.dtypes[name]} in its files and {dtype} in its manifest"
            if (gap := _gap(name, self.pieces[name], tuple(shape))) is not None:
                return gap
        strange = sorted(self.pieces.keys() - expected.keys())
        return f"{strange[0]} is not in its manifest" if strange else None

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill what this process holds of tensors, in place; their names and shapes are those on disk.

        A file is opened once, and only what is needed of it is read.
        """
        wanted: dict[Path, list[tuple[str, Piece, Tensor, tuple[int, ...]]]] = defaultdict(list)
        for name, tensor in tensors.items():
            for part, start in boxes(tensor):
                for piece in self.pieces[name]:
                    if _overlap(piece, start, part.shape) is not None:
                        wanted[piece.file].append((name, piece, part, start))
        for file, reads in wanted.items():
            with open_tensors(file) as opened, torch.no_grad():
                for name, piece, part, start in reads:
                    _copy(opened, name, piece, part, start)


def describe(shape: Sequence[int], dtype: torch.dtype | None) -> list[Any]:
    """Shape and dtype as a manifest has them."""
    return [list(shape), str(dtype)]


def _copy(opened: Any, name: str, piece: Piece, part: Tensor, start: tuple[int, ...]) -> None:
    if not piece.shape:
        part.copy_(opened.get_tensor(name))
        return
    common = _overlap(piece, start, part.shape)
    assert common is not None
    there = tuple(slice(a - first, b - first) for (a, b), first in zip(common, piece.start, strict=True))
    here = tuple(slice(a - first, b - first) for (a, b), first in zip(common, start, strict=True))
    part[here].copy_(opened.get_slice(name)[there])


def _overlap(piece: Piece, start: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """First and last index, plus one, of what a piece and another part have in common, in each dimension."""
    common = [
        (max(mine, other), min(mine + length, end))
        for mine, length, other, end in zip(start, shape, piece.start, piece.stop, strict=True)
    ]
    return common if all(first < end for first, end in common) else None


def _gap(name: str, pieces: Sequence[Piece], shape: tuple[int, ...]) -> str | None:
    """How pieces do not make up a tensor of a shape, None if they do."""
    for piece in pieces:
        if len(piece.shape) != len(shape) or any(end > size for end, size in zip(piece.stop, shape, strict=True)):
            return f"{piece.file.name} holds {name}{_index(piece)}, which lies outside of its shape {shape}"
    if twice := next((a for a, b in itertools.combinations(pieces, 2) if _overlap(a, b.start, b.shape)), None):
        return f"{name}{_index(twice)} is in {twice.file.name} and in another file"
    if sum(math.prod(piece.shape) for piece in pieces) == math.prod(shape):
        return None
    held = {i for piece in pieces for i in range(piece.start[0], piece.stop[0])}
    lacking = [i for i in range(shape[0]) if i not in held]
    if not lacking:
        return f"{name} of shape {shape} is not whole in its files"
    end = next((i for i in range(lacking[0], shape[0]) if i in held), shape[0])
    what = f", of experts {lacking[0]} to {end - 1}," if "expert" in name and len(shape) > 2 else ""
    return f"{name}[{lacking[0]}:{end}]{what} is in none of its files"


def _index(piece: Piece) -> str:
    return f"[{', '.join(f'{a}:{b}' for a, b in zip(piece.start, piece.stop, strict=True))}]"
