"""Decoding on a CPU with the C++ kernel, through `model.generate`."""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from moeify.backends.base import has_other_forward
from moeify.compress.quantize import quantize_decoder
from moeify.context import is_hook_of_context
from moeify.given import model_given
from moeify.hf.interface import use_moeify_experts
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.huge_pages import into_huge_pages
from moeify.serve.cache import PreallocatedLayer, preallocate
from moeify.serve.decoder import Decoder, find_decoder, has_no_weights
from moeify.serve.program import Program

Model = TypeVar("Model", bound=nn.Module)

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_PLAIN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}


_CACHES = {"past_key_values", "cache"}
_READ = {"attention_mask", "position_ids"}


def cache_name(model: nn.Module) -> str:
    """The name of a model's cache argument: `past_key_values`, or from transformers 5.24 on `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def fast_decode(model: Model, *, bits: int = 16) -> Model:
    """Run decoding steps of a model with the C++ kernel on a CPU; in place, `model.generate` is used as before.

    Prefill, and calls that need more than logits (hidden states, hooks, gradients), run the model's own forward pass.
    With 8 or 4 bits, linear layers and experts are permanently replaced by quantised ones; the head has 8 bits, and
    routers, norms and embeddings are not quantised. In bf16, on processors with AVX2 alone or with AVX-512 and VNNI,
    activations are quantised to int8 as well, for up to 24 tokens, but where AVX-512 lacks bf16 only beside weights of
    4 bits. Weights are moved into huge pages. One decoding step is compared with the model's own forward pass before
    the model is returned. Call it again after parameters were replaced or cast.

    Args:
        model: a Llama-like decoder of transformers (Llama, Mixtral, Qwen3), dense or sparse, or one made sparse by
            moeify.
        bits: 16 for unquantised weights, 8 or 4.

    Raises:
        ValueError: any other number of bits; an unsupported architecture; logits that differ from the kernel's.
    """
    if bits not in (16, 8, 4):
        raise ValueError(f"weights of {bits} bits are not supported; choose 16 (as they are), 8 or 4")
    plain_decode(model).eval()
    decoder = find_decoder(model)
    if bits < 16:
        quantize_decoder(model, bits)
        head: Any = model.lm_head
        decoder = replace(decoder, head=head)
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        use_moeify_experts(model)
    if reason := cpp.why_not():
        warnings.warn(f"the model decodes by torch, which is slower: the C++ kernel is missing, {reason}", stacklevel=2)
        return model
    into_huge_pages([*(part for layer in decoder.layers for part in (layer.attention, layer.mlp)), decoder.head])
    decode = _Decode(model, decoder)
    _must_agree(model, decode)
    model.forward = functools.wraps(model.forward)(decode)
    return model


def plain_decode(model: Model) -> Model:
    """Restore the model's own forward pass for decoding; in place, quantised weights remain quantised."""
    model_given(model).__dict__.pop("forward", None)
    return model


class _Decode:
    """A replacement for a model's `forward`, in which the kernel runs decoding steps of one token per sequence."""

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        self.model, self.slow = model, model.forward
        self.decoder = decoder
        self.parts = [module for module in model.modules() if module is not model]
        self.holders = [part for part in self.parts if part._parameters or part._buffers]
        self.cache_name = cache_name(model)
        self.program: Program | None = None

    def __call__(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        cache = next((kwargs.pop(name) for name in _CACHES if kwargs.get(name) is not None), None)
        if cache is None and kwargs.get("use_cache") is not False and not self.model.training:
            cache = DynamicCache()
        if cache is not None:
            kwargs[self.cache_name] = cache
        has_space = isinstance(cache, Cache) and preallocate(cache, len(self.decoder.layers))
        if has_space and input_ids is not None and not args and self._serves(input_ids, cache, kwargs):
            logits = self.fast(input_ids, cache, **{key: kwargs[key] for key in _READ & kwargs.keys()})
            output = CausalLMOutputWithPast(logits=logits)
            output[self.cache_name] = cache
            return output
        return self.slow(input_ids, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"program": None}  # the program points to the memory of the original

    def fast(
        self,
        input_ids: Tensor,
        cache: Cache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The logits of one decoding step."""
        tokens, length = len(input_ids), cache.get_seq_length()
        if self.program is None or self.program.tokens != tokens:
            self.program = Program(self.decoder, tokens)
        if attention_mask is None:
            first = torch.zeros(tokens, dtype=torch.int64)
        else:
            first = attention_mask.shape[1] - attention_mask.sum(1)
        if position_ids is None:
            position_ids = torch.full((1, 1), length)
        layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
        return self.program.run(input_ids, position_ids, first, layers)

    def _serves(self, input_ids: Tensor, cache: Cache, kwargs: dict[str, Any]) -> bool:
        """Whether a call requests only the logits of one more token per sequence, with no or left padding."""
        mask = kwargs.get("attention_mask")
        wanted = {name for name, value in kwargs.items() if value is not None and value is not False}
        return (
            input_ids.dim() == 2
            and input_ids.shape[1] == 1
            and cache.get_seq_length() > 0
            and wanted <= _PLAIN | _CACHES
            and (mask is None or _padded_left(mask, cache.get_seq_length() + 1))
            and not torch.is_grad_enabled()
            and not self.model.training
            and not any(map(_is_touched, self.parts))
            and not any(map(has_no_weights, self.holders))
        )


def _is_touched(part: nn.Module) -> bool:
    """Whether a module must be called, because it has hooks or another `forward`.

    Hooks of a `Context` do not count: those on the model itself have read the same inputs already.
    """
    if has_other_forward(part):
        return True
    hooks, pre_hooks = part._forward_hooks, part._forward_pre_hooks
    return bool(hooks or pre_hooks) and not all(map(is_hook_of_context, [*hooks.values(), *pre_hooks.values()]))


def _padded_left(mask: Tensor, length: int) -> bool:
    return mask.dim() == 2 and mask.shape[1] == length and bool((mask[:, 1:] >= mask[:, :-1]).all())


@torch.no_grad()
def _must_agree(model: Any, decode: _Decode) -> None:
    """Compare one kernel step with the model's own on eight sequences, by median: routing may differ for a few."""
    ids = torch.arange(48).view(8, 6) * 7919 % model.config.vocab_size
    cache = DynamicCache()
    preallocate(cache, len(decode.decoder.layers))
    model(ids[:, :5], **{cache_name(model): cache}, use_cache=True)
    ours = decode.fast(ids[:, 5:], cache)
    cache.crop(-1)
    theirs = model(ids[:, 5:], **{cache_name(model): cache}, use_cache=True).logits.float()
    error = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median().item()
    tolerance = _TOLERANCE[decode.decoder.dtype]
    if not error <= tolerance:
        raise ValueError(
            f"{type(model).__name__} computes something else than its parts say: a step of the kernel differs from its "
            f"own by {error:.2g} of the logits' length (allowed {tolerance:.2g}); decode it by model.generate as it is"
        )
