"""Weights of Mixtral, Qwen3-MoE and DeepSeek-V3 in the names and shapes of Megatron-Core, and back, bit for bit.

    embedding.word_embeddings.weight                                model.embed_tokens.weight
    decoder.layers.N.self_attention.linear_qkv.weight               q_proj, k_proj, v_proj, by groups of heads
    decoder.layers.N.mlp.router.weight                              mlp.gate.weight
    decoder.layers.N.mlp.router.expert_bias                         mlp.gate.e_score_correction_bias
    decoder.layers.N.mlp.experts.local_experts.E.linear_fc1.weight  mlp.experts.gate_up_proj[E]     (SequentialMLP)
    decoder.layers.N.mlp.experts.linear_fc1.weightE                 the same                        (TEGroupedMLP)
    decoder.layers.N.mlp.shared_experts.linear_fc1.weight           gate_proj, up_proj

Two layouts are known, those of Megatron-Core's layer specs: `local`, with experts one after the other, and
`transformer_engine`, with grouped experts and norms inside the linear layers behind them. `part` takes what one
expert-parallel rank holds, `tensor_part` what one tensor-parallel rank does. Names as of Megatron-Core 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Layout = Literal["local", "transformer_engine"]
Slices = Literal["all", "experts", "rest"]
Weights = dict[str, Tensor]
_FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class _Rule:
    """How some tensors of a layer of transformers become one of Megatron, and back.

    Attributes:
        megatron: its name inside the layer.
        hf: their names inside the layer.
        join: them to it, one after the other along the rows unless stated.
        split: it to them.
    """

    megatron: str
    hf: tuple[str, ...]
    join: Callable[..., Tensor] = lambda *parts: torch.cat(parts)
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda whole: (whole,)


def to_megatron(weights: Mapping[str, Tensor], config: Any, layout: Layout = "local") -> Weights:
    """The tensors of a model of transformers under the names of Megatron-Core's `GPTModel`, in new memory.

    Args:
        weights: `model.state_dict()`.
        config: `model.config`.
        layout: `local` or `transformer_engine`.

    Raises:
        ValueError: another family, an unknown layout, or a tensor that is missing or has no place in Megatron's model.
    """
    left = dict(weights)
    if config.tie_word_embeddings:  # Megatron's model has no output layer then
        left.pop("lm_head.weight", None)
    result = {theirs: _taken(left, ours).clone() for theirs, ours in _outside(config).items()}
    for n in range(config.num_hidden_layers):
        there, here = f"decoder.layers.{n}.", f"model.layers.{n}."
        for rule in _rules(config, n, layout):
            result[there + rule.megatron] = rule.join(*(_taken(left, here + name) for name in rule.hf))
        if _is_sparse(config, n):
            for stack, projection in _STACKS.items():
                stacked = _taken(left, f"{here}mlp.experts.{stack}")
                for e, weight in enumerate(stacked):
                    result[there + _expert(projection, e, layout)] = weight.clone()
    _require_none(left, "Megatron-Core's model has no place for them")
    return result


def from_megatron(weights: Mapping[str, Tensor], config: Any, layout: Layout = "local") -> Weights:
    """The tensors of Megatron-Core's `GPTModel` under the names of a model of transformers, in new memory.

    Args:
        weights: all experts of all ranks, as `to_megatron` gives them.
        config: of the model of transformers.
        layout: `local` or `transformer_engine`.

    Raises:
        ValueError: as of `to_megatron`.
    """
    left = {name: tensor for name, tensor in weights.items() if not name.endswith("_extra_state")}
    result = {ours: _taken(left, theirs).clone() for theirs, ours in _outside(config).items()}
    for n in range(config.num_hidden_layers):
        there, here = f"decoder.layers.{n}.", f"model.layers.{n}."
        for rule in _rules(config, n, layout):
            parts = rule.split(_taken(left, there + rule.megatron))
            result |= {here + name: part.clone() for name, part in zip(rule.hf, parts, strict=True)}
        if _is_sparse(config, n):
            for stack, projection in _STACKS.items():
                experts = range(_num_experts(config))
                parts = [_taken(left, there + _expert(projection, e, layout)) for e in experts]
                result[f"{here}mlp.experts.{stack}"] = torch.stack(parts)
    _require_none(left, "the model of transformers has no place for them")
    if config.tie_word_embeddings:
        result["lm_head.weight"] = result["model.embed_tokens.weight"]
    return result


def part(weights: Mapping[str, Tensor], rank: int, ranks: int) -> Weights:
    """What an expert-parallel rank of Megatron holds: its experts, numbered from 0, and all that is no expert.

    Raises:
        ValueError: ranks that cannot share the experts evenly.
    """
    numbers = [int(found[2]) for name in weights if (found := _EXPERT.search(name))]
    experts = max(numbers, default=-1) + 1
    if experts % ranks:
        raise ValueError(f"{experts} experts cannot be shared evenly by {ranks} ranks; choose a divisor of {experts}")
    held, result = experts // ranks, {}
    for name, tensor in weights.items():
        if (found := _EXPERT.search(name)) is None:
            result[name] = tensor
        elif int(found[2]) // held == rank:
            result[_EXPERT.sub(rf"\g<1>{int(found[2]) % held}", name)] = tensor
    return result


def tensor_part(weights: Mapping[str, Tensor], config: Any, rank: int, ranks: int, of: Slices = "all") -> Weights:
    """What a tensor-parallel rank of Megatron holds of a whole model, or of what `part` returned; views.

    Rows of queries, keys, values, embeddings and first products are shared, and columns of the products behind them. Of
    gated ones a rank has its rows of the gate, then its rows of the other. Norms and routers are everywhere.

    Args:
        weights: as of `to_megatron`.
        config: of the model of transformers.
        rank: of the tensor-parallel group.
        ranks: its size.
        of: slice `experts` or the `rest` only, where `expert-tensor-parallel-size` is another than
            `tensor-model-parallel-size`: call it for both.

    Raises:
        ValueError: ranks that cannot share heads or a matrix evenly.
    """
    _require_groups(config, ranks)
    fused = not any("local_experts" in name for name in weights)
    result = {}
    for name, tensor in weights.items():
        where = _sliced(name, of, fused)
        if where is None:
            result[name] = tensor
            continue
        pieces = tensor.chunk(2) if where == "gated" else (tensor,)
        dim = int(where == "columns")
        if pieces[0].shape[dim] % ranks:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} cannot be shared evenly by {ranks} ranks")
        mine = [piece.chunk(ranks, dim)[rank] for piece in pieces]
        result[name] = torch.cat(mine) if len(mine) > 1 else mine[0]
    return result


def from_tensor_parts(parts: Sequence[Mapping[str, Tensor]], of: Slices = "all") -> Weights:
    """The whole tensors of which tensor-parallel ranks hold slices, in the order of their ranks, in new memory.

    Raises:
        ValueError: ranks with different tensors, or that differ in one that all hold whole.
    """
    if len({frozenset(held) for held in parts}) > 1:
        raise ValueError("the ranks hold tensors of different names; pass the parts of one tensor-parallel group")
    fused = not any("local_experts" in name for name in parts[0])
    result = {}
    for name, first in parts[0].items():
        held, where = [part[name] for part in parts], _sliced(name, of, fused)
        if where is None:
            if not all(torch.equal(_bits(first), _bits(other)) for other in held):
                raise ValueError(f"{name} is whole on every rank, and not the same on all of them")
            result[name] = first.clone()
        elif where == "gated":
            result[name] = torch.cat(
                [half for halves in zip(*(p.chunk(2) for p in held), strict=True) for half in halves]
            )
        else:
            result[name] = torch.cat(held, int(where == "columns"))
    return result


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _sliced(name: str, of: Slices, fused: bool) -> Literal["rows", "gated", "columns"] | None:
    """How tensor-parallel ranks share a tensor, None where each has all of it."""
    if of != "all" and (of == "experts") != ("mlp.experts." in name):
        return None
    if "linear_fc1.weight" in name:
        return "gated"
    if "linear_fc2.weight" in name or name.endswith("linear_proj.weight"):
        return "columns"
    down = () if fused else ("linear_q_down_proj", "linear_kv_down_proj")  # Transformer Engine's layers duplicate these
    rows = ("word_embeddings", "output_layer", "linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
    return "rows" if name.endswith(tuple(f"{part}.weight" for part in (*rows, *down))) else None


def _require_groups(config: Any, ranks: int) -> None:
    heads = config.num_attention_heads if config.model_type == "deepseek_v3" else config.num_key_value_heads
    if heads % ranks:
        raise ValueError(
            f"{heads} groups of heads cannot be shared evenly by {ranks} ranks; choose a divisor of {heads}"
        )


_STACKS = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)")


def _expert(projection: str, number: int, layout: Layout) -> str:
    if layout == "local":
        return f"mlp.experts.local_experts.{number}.{projection}.weight"
    return f"mlp.experts.{projection}.weight{number}"


def _outside(config: Any) -> dict[str, str]:
    """Tensors outside the layers: Megatron's name, and that of transformers."""
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
    }
    return names if config.tie_word_embeddings else names | {"output_layer.weight": "lm_head.weight"}


def _rules(config: Any, layer: int, layout: Layout) -> list[_Rule]:
    """All of a layer but its stacked experts."""
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"the weights of {config.model_type} have no rules for Megatron-Core, only those of "
            f"{', '.join(_FAMILIES)}; a model of moeify becomes one by moeify export --to transformers"
        )
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} is not known; choose from {', '.join(get_args(Layout))}")
    fused, latent, sparse = layout != "local", config.model_type == "deepseek_v3", _is_sparse(config, layer)
    norm = "self_attention.linear_qkv.layer_norm_weight" if fused and not latent else "input_layernorm.weight"
    second = "mlp.linear_fc1.layer_norm_weight" if fused and not sparse else "pre_mlp_layernorm.weight"
    rules = [
        _Rule(norm, ("input_layernorm.weight",)),
        _Rule(second, ("post_attention_layernorm.weight",)),
        _Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
        *(_latent_attention(config, fused=fused) if latent else _attention(config)),
    ]
    if not sparse:
        return [*rules, *_dense("mlp.", "mlp.")]
    rules.append(_Rule("mlp.router.weight", ("mlp.gate.weight",)))
    if latent:
        rules.append(_Rule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)))
        rules += _dense("mlp.shared_experts.", "mlp.shared_experts.")
    return rules


def _dense(there: str, here: str) -> list[_Rule]:
    return [
        _Rule(
            f"{there}linear_fc1.weight",
            (f"{here}gate_proj.weight", f"{here}up_proj.weight"),
            split=lambda whole: whole.chunk(2),
        ),
        _Rule(f"{there}linear_fc2.weight", (f"{here}down_proj.weight",)),
    ]


def _attention(config: Any) -> list[_Rule]:
    """Queries, keys and values in one matrix: for every key head its queries, itself, and its value head."""
    groups = config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = (config.num_attention_heads // groups * head, head, head)

    def join(*parts: Float[Tensor, "rows D"]) -> Float[Tensor, "all D"]:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    def split(whole: Float[Tensor, "all D"]) -> tuple[Tensor, ...]:
        return tuple(part.flatten(0, 1) for part in whole.unflatten(0, (groups, -1)).split(rows, 1))

    names = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    rules = [_Rule("self_attention.linear_qkv.weight", names, join, split)]
    if config.model_type == "qwen3_moe":
        rules += [_Rule(f"self_attention.{x}_layernorm.weight", (f"self_attn.{x}_norm.weight",)) for x in "qk"]
    return rules


def _latent_attention(config: Any, *, fused: bool) -> list[_Rule]:
    """Multi-head latent attention, whose matrices Megatron holds as transformers does."""
    names = {"linear_kv_down_proj": "kv_a_proj_with_mqa", "linear_kv_up_proj": "kv_b_proj"}
    norms = {"kv": "kv_a_layernorm"}
    if config.q_lora_rank is None:
        names["linear_q_proj"] = "q_proj"
    else:
        names |= {"linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj"}
        norms["q"] = "q_a_layernorm"
    rules = [_Rule(f"self_attention.{there}.weight", (f"self_attn.{here}.weight",)) for there, here in names.items()]
    for which, here in norms.items():
        there = f"linear_{which}_up_proj.layer_norm_weight" if fused else f"{which}_layernorm.weight"
        rules.append(_Rule(f"self_attention.{there}", (f"self_attn.{here}.weight",)))
    return rules


def _is_sparse(config: Any, layer: int) -> bool:
    if config.model_type == "deepseek_v3":
        return layer >= config.first_k_dense_replace
    dense = getattr(config, "mlp_only_layers", None) or ()
    return layer not in dense and (layer + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0


def _num_experts(config: Any) -> int:
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    return next(number for name in names if (number := getattr(config, name, None)) is not None)


def _taken(left: Weights, name: str) -> Tensor:
    if name not in left:
        raise ValueError(f"{name} is missing; pass all weights of the model, in the layout that they have")
    return left.pop(name)


def _require_none(left: Weights, reason: str) -> None:
    if left:
        names = sorted(left)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{', '.join(names[:3])}{more} would be lost: {reason}")
