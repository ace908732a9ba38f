"""Generate tokens greedily after a batch, and remove the tokens after the end of each sequence from its trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moeify.inspect.trace import Tokens, Trace


def generated(model: nn.Module, args: Sequence[Any], inputs: dict[str, Any], tokens: int) -> Int[Tensor, "B N"]:
    """The sequences with the tokens that the model generates greedily, until it has read `tokens` of them.

    Raises:
        ValueError: a model that cannot generate.
    """
    if not hasattr(model, "generate"):
        raise ValueError(f"a {type(model).__name__} cannot generate; trace it without `generate`")
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
    """The trace without the tokens after the end of their sequence, computed while other sequences continued.

    Args:
        trace: of one batch; in step s the model reads the token of step s - 1.
        model: the model.
        written: the generated sequences, prompts included.
        steps: its forward passes, one for every generated token.
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
