"""Let a model write after a batch, and cut off what it goes on to compute for sequences that have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moeify.inspect.trace import Tokens, Trace


def write(model: nn.Module, args: Sequence[Any], inputs: dict[str, Any], tokens: int) -> Int[Tensor, "B N"]:
    """The sequences with what the model writes, always the likeliest, until it has read so many of its own tokens.

    Raises:
        ValueError: a model that writes nothing.
    """
    if not hasattr(model, "generate"):
        raise ValueError(f"a {type(model).__name__} does not write; trace it without generating")
    if "input_ids" in inputs:
        inputs = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
    writer: Any = model
    pad = getattr(writer.generation_config, "pad_token_id", None)
    ends = _ends(model)
    settings: dict[str, Any] = {"max_new_tokens": tokens + 1, "do_sample": False, "num_beams": 1, "use_cache": True}
    if pad is None and ends:
        settings["pad_token_id"] = ends[0]
    written = writer.generate(*args, **inputs, **settings)
    return written if isinstance(written, Tensor) else written.sequences


def until_the_end(trace: Trace, model: nn.Module, written: Int[Tensor, "B N"], steps: int) -> Trace:
    """The trace without the tokens that follow the end of their sequence, which others of the batch outlive.

    Args:
        trace: of one batch; in step s the model reads what it wrote in step s - 1.
        model: it.
        written: what it wrote, prompts included.
        steps: its forward passes, one for every token that it wrote.
    """
    new = written[:, written.shape[1] - steps :].cpu()
    is_end = torch.isin(new, torch.tensor(_ends(model), dtype=new.dtype))
    last = torch.where(is_end.any(1), is_end.int().argmax(1), steps)
    if not is_end.any():
        return trace

    def lives(tokens: Tokens) -> Tensor:
        step = tokens.need("step")
        return (step == 0) | (step <= last[tokens.need("sequence").long().clamp(max=len(last) - 1)])

    return trace.where(lives)


def _ends(model: Any) -> list[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)
