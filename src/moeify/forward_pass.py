"""One forward pass of a stack of layers: which of its tokens are real, and which of them belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from moeify import masks
from moeify.documents import Packing, document_ids

TOKENS = ("input_ids", "inputs_embeds", "hidden_states")


@dataclass(eq=False)
class Call:
    """One forward pass of a stack: what the modules above it were called with, and the decisions of its routers.

    Attributes:
        token_mask: True where a token is real, None where every token is.
        positions: the real tokens as indices into the flattened tokens, None where every token is real.
        inputs: the tensors that the outermost module was called with, by argument name.
        packing: the arguments that determine where the documents of packed rows begin, None if there are none.
        decisions: the decisions that later layers read (shared routing, residuals), by router.
        batch_first: whether tokens are laid out as (B, N, D), and not sequence first as (N, B, D).
        unpadded: the number of tokens of an input without padding, by the modules above the layers.
        from_labels: whether the mask is the one that the labels of an encoder-decoder imply for its decoder.
        rows: (B, N) of the stack's tokens, None where it was not called with any.
        of_stack: whether the mask was given to the module that holds the layers, and not only to one above it.
        layer_mask: the mask that the layer around a sparse one is given, with its name; None if it is given none,
            False if no layer takes one, or not as a tensor.
        outer: the pass in progress when the model was called again, None for the outermost.
        begun_by: the module that was called: the model, or one inside it that is called by itself.
        repeated: whether a backward pass has repeated it outside of `Context.resumed`.
        frame: of the function that calls `begun_by`, until it returns or raises an exception; None in a graph.
    """

    token_mask: Bool[Tensor, "B N"] | None = None
    positions: Int[Tensor, "T"] | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    packing: Packing | None = None
    decisions: dict[nn.Module, Any] = field(default_factory=dict)
    batch_first: bool = True
    unpadded: int | None = None
    from_labels: bool = False
    rows: tuple[int, int] | None = None
    of_stack: bool = False
    layer_mask: tuple[str, Tensor] | Literal[False] | None = False
    outer: Call | None = None
    begun_by: nn.Module | None = None
    repeated: bool = False
    frame: FrameType | None = None
    _read: dict[tuple[int, ...], tuple[Any, Int[Tensor, "T"] | None]] = field(default_factory=dict)
    _documents: dict[tuple[int, ...], tuple[Any, Any, Int[Tensor, "T"]]] = field(default_factory=dict)

    @property
    def was_interrupted(self) -> bool:
        """Whether the pass has ended without its hooks, which torch calls after an exception, but not after Ctrl-C."""
        if torch.compiler.is_compiling() or self.frame is None:
            return False
        try:
            self.frame.clear()
        except RuntimeError:  # it still runs
            return False
        return True

    def mask(self, token_mask: Tensor | None) -> None:
        """Set which tokens are real: 1 or True for a token, 0 or False for padding.

        Raises:
            ValueError: not a single token is real.
        """
        self.token_mask = self.positions = None
        if token_mask is None:
            return
        real = token_mask.bool()
        positions = real.flatten().nonzero().squeeze(1)
        if torch.compiler.is_exporting():  # the exported program must work for every mask
            self.token_mask, self.positions = real, positions
            return
        if positions.numel() == 0:
            raise ValueError(
                f"the attention mask of shape {tuple(real.shape)} marks every token as padding; "
                "leave such batches out, no expert can learn from them"
            )
        if positions.numel() < real.numel():
            self.token_mask, self.positions = real, positions

    def real(self, shape: int | Sequence[int]) -> Int[Tensor, "T"] | None:
        """The positions of the real ones among flattened tokens, None for all of them.

        The mask of the modules above the layers counts where it has as many tokens, unless the layer around a sparse
        one is given another: a mask of its keys alone, or none at all, as in layers of patches beside equally many
        words. Where the layers have tokens of their own (a model downsampled them, put patches beside words, or filled
        up a window), only the mask that the layer is given counts; a stack whose layers are given none has no padding.

        Args:
            shape: of the tokens, (B, N) or (N, B), or their number.

        Raises:
            ValueError: the only mask there is is one of other tokens, so it belongs to another call.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        tokens = math.prod(shape)
        if self.token_mask is not None and self.token_mask.numel() == tokens:
            if self.layer_mask is None and not self.from_labels:  # as many tokens, but of another stack
                return None
            if isinstance(self.layer_mask, tuple) and masks.is_of_keys(self.layer_mask[1], tokens):
                return self._of_layer(*self.layer_mask, shape)
            return self._laid_out(self.token_mask, shape)
        if self.token_mask is None and self.unpadded == tokens:
            return None
        if isinstance(self.layer_mask, tuple):
            return None if self._exports_without_mask() else self._of_layer(*self.layer_mask, shape)
        if self.token_mask is None or self.layer_mask is None or (self.inputs and not self.of_stack):
            return None
        raise ValueError(
            f"the token mask has {tuple(self.token_mask.shape)} = {self.token_mask.numel()} tokens, but the layer "
            f"was given {tokens}; call the layer through its model, or context.clear() before calling it alone"
        )

    def _exports_without_mask(self) -> bool:
        """Whether a graph is exported without a mask among its inputs, so that any mask of a layer masks nothing."""
        return torch.compiler.is_exporting() and not any("mask" in name for name in self.inputs)

    def _laid_out(self, mask: Bool[Tensor, "B N"], shape: tuple[int, ...]) -> Int[Tensor, "T"] | None:
        """The positions of the real tokens, of a mask (B, N), in a layer that turns out to be laid out as (N, B)."""
        if len(shape) != 2 or shape == mask.shape or shape != mask.shape[::-1]:
            return self.positions
        if torch.compiler.is_exporting():
            return mask.T.flatten().nonzero().squeeze(1)
        if shape not in self._read:
            self._read[shape] = (mask, mask.T.flatten().nonzero().squeeze(1))
        return self._read[shape][1]

    def _of_layer(self, name: str, mask: Tensor, shape: tuple[int, ...]) -> Int[Tensor, "T"] | None:
        """The positions of the real tokens by the mask of the layer, read once per mask."""
        if torch.compiler.is_exporting():  # sizes are symbols, which no dict takes for keys
            return self._positions_in_layer(name, mask, shape)
        if shape not in self._read or self._read[shape][0] is not mask:
            positions = self._positions_in_layer(name, mask, shape)
            every = positions is None or not 0 < positions.numel() < math.prod(shape)
            self._read[shape] = (mask, None if every else positions)
        return self._read[shape][1]

    def _positions_in_layer(self, name: str, mask: Tensor, shape: tuple[int, ...]) -> Int[Tensor, "T"] | None:
        real = masks.of_layer(name, mask, shape)
        if real is not None and len(shape) == 2:
            square = not self.batch_first and shape[0] == shape[1]
            real = real.T if square or real.shape != shape else real
        return None if real is None else real.flatten().nonzero().squeeze(1)

    def sequence_ids(self, shape: Sequence[int]) -> Int[Tensor, "T"]:
        """The sequence, document or image of each of the flattened tokens of a layer input with leading shape `shape`.

        A flattened input is one sequence, unless the model's own input shows the length of its sequences.

        Raises:
            ValueError: as of `documents`.
        """
        if (documents := self.documents(shape)) is not None:
            return documents
        length = self._row_length(shape)
        rows = torch.arange(math.prod(shape) // (length or 1))  # there may be no tokens
        return rows.unsqueeze(1).expand(-1, length).flatten() if self.batch_first else rows.repeat(length)

    def common_length(self, shape: Sequence[int]) -> int | None:
        """The length that all sequences have, None where padding or packing may make them differ.

        Raises:
            ValueError: as of `documents`.
        """
        differ = self.real(shape) is not None or self.documents(shape) is not None
        return None if differ else self._row_length(shape)

    def _row_length(self, shape: Sequence[int]) -> int:
        if not shape:
            return 1
        if len(shape) == 1 and self.rows is not None and math.prod(self.rows) == shape[0]:
            return self.rows[1]
        if len(shape) == 1:
            shape = next((t.shape for name, t in self.inputs.items() if _fits(name, t, shape[0])), (1, *shape))
        return shape[-1] if self.batch_first else math.prod(shape) // shape[-1]

    def documents(self, shape: Sequence[int]) -> Int[Tensor, "T"] | None:
        """The document of each of the flattened tokens, counted over the batch; None if no input describes documents.

        A row is packed of several where `position_ids` do not rise, `seq_idx` changes, `cu_seq_lens_q`, `cu_seqlens` or
        `grid_thw` say so, a mask numbers its documents (1, 1, 2, 2, 0), or one of queries and keys is block-diagonal.

        Raises:
            ValueError: the rows that the stack was given are packed, and the layer has other tokens than theirs.
        """
        packing, shape = self.packing, tuple(shape)
        if packing is None:
            return None
        positions = self.real(shape)
        of_packing, of_positions, ids = self._documents.get(shape, (None, None, None))
        if ids is None or of_packing is not packing or of_positions is not positions:
            if (starts := packing.starts(math.prod(shape))) is None:
                return packing.refuse(shape)
            ids = self._document_ids(starts, positions)
            self._documents[shape] = (packing, positions, ids)
        return ids

    def cut(self, parts: int, shape: Sequence[int]) -> Call:
        """The same pass of tokens that are each cut into parts, adjacent in its sequence: (B, N · parts).

        What holds for a token holds for its parts: padding, documents and what the model was given for it.

        Args:
            parts: of every token.
            shape: of the tokens, (B, N) or (N, B), or their number.
        """
        tokens, real, positions = math.prod(shape), None, self.real(shape)
        if positions is not None:
            real = torch.zeros(tokens, dtype=torch.bool, device=positions.device).scatter(0, positions, True)
            real = real.view(tuple(shape))
            real = (real if self.batch_first or real.dim() < 2 else real.T).repeat_interleave(parts, dim=-1)
        inputs = {
            name: value.repeat_interleave(parts, dim=1)
            if value.dim() > 1 and math.prod(value.shape[:2]) == tokens
            else value
            for name, value in self.inputs.items()
        }
        packing = None if self.packing is None else self.packing.repeated(parts, tokens)
        pieces = Call(
            inputs=inputs, packing=packing, decisions=self.decisions, outer=self.outer, begun_by=self.begun_by
        )
        pieces.mask(real)
        return pieces

    def _document_ids(self, starts: Bool[Tensor, "B N"], positions: Int[Tensor, "T"] | None) -> Int[Tensor, "T"]:
        """The document of each token, in the layout of the layer."""
        real = None
        if positions is not None:
            real = torch.zeros(starts.numel(), dtype=torch.bool, device=starts.device)
            real = real.index_fill(0, positions.to(starts.device), True)
            real = real.view(starts.shape) if self.batch_first else real.view(starts.shape[::-1]).T
        ids = document_ids(starts, real)
        return (ids if self.batch_first else ids.T).flatten()


def _fits(name: str, tensor: Tensor, tokens: int) -> bool:
    return name in TOKENS and tensor.shape[:2].numel() == tokens
