"""Find the documents of packed rows by the arguments of a call: position ids, lengths, indices or attention masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moeify import masks

Shape = tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """The arguments of a module's call that determine where the documents of packed rows begin.

    Attributes:
        arguments: these arguments, by name.
        shape: (B, N) of the tokens that they describe; None if the call does not show it.
        of_stack: whether the module is the one that holds the layers, whose tokens must then have this shape.
    """

    arguments: Mapping[str, Any]
    shape: Shape | None
    of_stack: bool = False

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], shape: Shape | None, *, above: Packing | None = None, of_stack: bool = False
    ) -> Packing | None:
        """The packing that a module's arguments and those of the module above describe; None if they describe none.

        Args:
            arguments: of its call, by name.
            shape: (B, N) of its tokens; None if its call does not show it.
            above: the packing of the module above, which holds if it describes the same tokens.
            of_stack: whether it is the module that holds the layers.
        """
        described = own = {name: arguments[name] for name in _STARTS if _describes(name, arguments.get(name))}
        if above is not None and (shape is None or above.shape in (None, shape)):
            described, shape = {**above.arguments, **own}, shape or above.shape
        return cls(described, shape, of_stack and bool(own)) if described and (shape is None or shape[1] > 1) else None

    def starts(self, tokens: int) -> Bool[Tensor, "B N"] | None:
        """Where a document begins, by any of the arguments; None if they are about another number of tokens."""
        shape = self.shape or (1, tokens)
        if math.prod(shape) != tokens:
            return None
        found = [
            starts for name, value in self.arguments.items() if (starts := _STARTS[name](value, shape)) is not None
        ]
        return reduce(torch.logical_or, found) if found else None

    def refuse(self, shape: Sequence[int]) -> None:
        """Refuse a layer whose tokens have another shape than the packed rows of its own stack.

        Raises:
            ValueError: they are.
        """
        starts = self.starts(math.prod(self.shape)) if self.of_stack and self.shape else None
        if starts is not None and starts[:, 1:].any():
            raise ValueError(
                f"the arguments {', '.join(self.arguments)} pack several documents into rows of {self.shape} tokens, "
                f"and this layer has {tuple(shape)} tokens, so nothing says which of these belong to one document; "
                "call the model with one document per row"
            )

    def repeated(self, times: int, tokens: int) -> Packing | None:
        """The same documents where every token is cut into adjacent parts."""
        if (starts := self.starts(tokens)) is None:
            return None
        ids = document_ids(starts, None).repeat_interleave(times, dim=1)
        return Packing({"seq_idx": ids}, (ids.shape[0], ids.shape[1]))


def document_ids(starts: Bool[Tensor, "B N"], real: Bool[Tensor, "B N"] | None) -> Int[Tensor, "B N"]:
    """The document of every token, counted through the batch; every row has at least one.

    Args:
        starts: where a document begins, beside the first token of a row.
        real: the tokens that are not padding; padding begins no document, and belongs to the one before it.
    """
    real = torch.ones_like(starts) if real is None else real
    first = real & (real.cumsum(1) == 1)
    within = ((starts & real) | first).cumsum(1)  # 1 for the first document of a row, 0 for padding before it
    documents = within[:, -1].clamp_min(1)
    return (documents.cumsum(0) - documents).unsqueeze(1) + (within - 1).clamp_min(0)


def _describes(name: str, value: Any) -> bool:
    """Whether an argument is there; a mask with one entry per token marks padding, or numbers documents."""
    if name != "attention_mask":
        return isinstance(value, Tensor)
    if value is None or torch.compiler.is_exporting():  # a graph takes rows of one text
        return False
    return not isinstance(value, Tensor) or value.dim() > 2 or masks.numbers_documents(value)


def _changes(ids: Int[Tensor, "B N"], shape: Shape) -> Bool[Tensor, "B N"] | None:
    """Where the number of the document is not that of the token before."""
    if ids.dim() != 2 or ids.shape[1] != shape[1] or ids.shape[0] not in (1, shape[0]):
        return None
    return (ids.diff(dim=1, prepend=ids[:, :1]) != 0).expand(shape)


def _offsets(first: Int[Tensor, "B+1"], shape: Shape) -> Bool[Tensor, "B N"] | None:
    """Documents by the place of their first token among all (flash attention's cumulative lengths)."""
    if first.dim() != 1:
        return None
    return torch.isin(torch.arange(math.prod(shape), device=first.device), first).view(shape)


def _images(grid: Int[Tensor, "images 3"], shape: Shape) -> Bool[Tensor, "B N"] | None:
    """Images and videos, one after the other, by time, height and width in patches (Qwen2-VL)."""
    return None if grid.dim() != 2 else _offsets(grid.prod(1).cumsum(0), shape)


def _restarts(position: Int[Tensor, "*A B N"], shape: Shape) -> Bool[Tensor, "B N"] | None:
    """Where positions do not rise, along none of their axes if there are several (M-RoPE)."""
    position = position.unsqueeze(0) if position.dim() == 1 else position
    if position.is_floating_point() or position.shape[-1] != shape[1] or position.shape[-2] not in (1, shape[0]):
        return None
    axes = position.reshape(-1, *position.shape[-2:])
    return (axes.diff(dim=2, prepend=axes[:, :, :1]) <= 0).all(0).expand(shape)


def _of_mask(mask: Any, shape: Shape) -> Bool[Tensor, "B N"] | None:
    """Where a document begins by a mask that numbers them, 0 for padding, or by one of queries and keys."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return _blocks(mask, shape)
    return _changes(mask[:, -shape[1] :], shape)  # those of keys that a cache holds come before


def _blocks(mask: Any, shape: Shape) -> Bool[Tensor, "B N"] | None:
    """Where a document begins by a mask of queries and keys: no token from here on attends to an earlier one."""
    if isinstance(mask, Mapping):  # of several types of attention; the widest one shows documents
        mask = mask.get("full_attention")
    if type(mask).__name__ == "BlockMask":
        mask = _written_out(mask)
    length = shape[1]
    if not isinstance(mask, Tensor) or mask.shape[-2:] != (length, length) or mask.shape[0] not in (1, shape[0]):
        return None
    seen = masks.seen(mask).reshape(mask.shape[0], -1, length, length).any(1)
    seen = seen | seen.mT
    place = torch.arange(length, device=mask.device)
    earliest = torch.where(seen, place, length).amin(-1).minimum(place)
    return (earliest.flip(-1).cummin(-1).values.flip(-1) >= place).expand(shape)


def _written_out(mask: Any) -> Bool[Tensor, "B H Q K"]:
    """The table of a mask of flex attention."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, *mask.shape, device=mask.kv_num_blocks.device)


_STARTS: dict[str, Callable[[Any, Shape], Bool[Tensor, "B N"] | None]] = {
    "seq_idx": _changes,
    "cu_seq_lens_q": _offsets,
    "cu_seqlens": _offsets,
    "grid_thw": _images,
    "position_ids": _restarts,
    "attention_mask": _of_mask,
}
