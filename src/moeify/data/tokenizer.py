"""The tokenizer protocol that training data needs, and the default tokenizer, whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """The methods of a tokenizer that moeify uses; those of Hugging Face have them."""

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
    padding_side = "right"

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text."""
        return list(text.encode(errors="replace"))

    def decode(self, token_ids: Iterable[int] | Int[Tensor, "_"]) -> str:
        """Return the text of the bytes; what is not UTF-8 becomes `\N{REPLACEMENT CHARACTER}`."""
        return bytes(i for i in map(int, token_ids) if i < 256).decode(errors="replace")

    def pad(
        self,
        features: Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """Collate samples into one batch, as the tokenizers of transformers do for its data collators.

        Samples are padded on the right: `input_ids` with `pad_token_id`, `labels` with -100, `attention_mask` (made if
        it is not there) and every other field of one value per token with 0. Other fields are stacked.

        Args:
            features: samples with `input_ids`, all with the same fields.
            padding: True or "longest" to the longest sample, "max_length" to `max_length`.
            max_length: the width of the batch for "max_length".
            pad_to_multiple_of: round the width up to a multiple of it.
            return_tensors: "pt"; there are no others.

        Returns:
            (B, N) per field of one value per token, (B,) per other field.

        Raises:
            ValueError: another padding or kind of tensors; a sample that is longer than the batch.
        """
        if padding not in (True, "longest", "max_length") or return_tensors != "pt":
            raise ValueError(
                f"padding={padding!r} to tensors {return_tensors!r} is not supported; choose padding 'longest' or "
                "'max_length', and 'pt'"
            )
        lengths = [len(sample["input_ids"]) for sample in features]
        width = max_length if padding == "max_length" and max_length is not None else max(lengths)
        if pad_to_multiple_of is not None:
            width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
        if max(lengths) > width:
            raise ValueError(f"a sample of {max(lengths)} tokens does not fit {width}; cut it, or raise max_length")
        fill = {"input_ids": self.pad_token_id, "labels": -100}
        batch = {}
        for field in features[0]:
            columns = [torch.as_tensor(sample[field]) for sample in features]
            per_token = all(c.dim() == 1 and len(c) == n for c, n in zip(columns, lengths, strict=True))
            batch[field] = torch.stack(
                [_padded(c, width, fill.get(field, 0)) for c in columns] if per_token else columns
            )
        if "attention_mask" not in batch:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
        return batch


def _padded(column: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(column, (0, width - len(column)), value=value)
