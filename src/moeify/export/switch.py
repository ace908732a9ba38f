"""T5 with top-1 experts as Switch Transformers, the encoder-decoder class of transformers with experts, and back.

The traits of a T5 have the names of its config; its tensors have those of Switch Transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.experts import FFN
from moeify.export.families import Family
from moeify.export.model_spec import ModelSpec, Unsupported
from moeify.export.routers import token_choice_of
from moeify.export.rules import Field, Traits
from moeify.kernels.stacked import Plain
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.store.config import architecture_of
from moeify.store.peft import has_adapters

_NO_CAPACITY = 2**31 - 1
_SIZES = ("vocab_size", "d_model", "d_kv", "num_layers", "num_decoder_layers", "num_heads")
_OTHERS = (
    "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "dropout_rate",
    "initializer_factor", "dense_act_fn", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
)  # fmt: skip
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_SPARSE = {"encoder": 1, "decoder": 2}
"""Where the feed-forward network is among the parts of a block of each stack."""


@dataclass(frozen=True)
class SparseBlocks:
    """A number of sparse blocks, spread evenly over a stack, from which the class computes an interval.

    Attributes:
        name: of the field.
        blocks: the field with the number of all blocks.
        step: the interval that the config computes.
    """

    name: str
    blocks: str
    step: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.name,)

    def read(self, config: Any) -> tuple[int, ...]:
        """The sparse blocks."""
        return _sparse_blocks(getattr(config, self.step), getattr(config, self.blocks))

    def write(self, value: tuple[int, ...], traits: Traits) -> dict[str, Any]:
        """The number that gives exactly these."""
        blocks = traits[self.blocks]
        for number in range(1, blocks + 1):
            if _sparse_blocks(blocks // number, blocks) == value:
                return {self.name: number}
        raise Unsupported(
            f"its sparse blocks are every block, or the second and others at equal intervals, of the model {value}"
        )


def _sparse_blocks(step: int, blocks: int) -> tuple[int, ...]:
    """As `SwitchTransformersStack` of transformers finds them."""
    return tuple(i for i in range(blocks) if step == 1 or (step and i % step == 1))


SWITCH = Family(
    "switch_transformers", "Switch Transformers",
    {
        **{name: Field(name) for name in (*_SIZES, *_OTHERS)},
        "d_ff": Field("d_ff"), "expert_width": Field("d_ff"), "num_experts": Field("num_experts"),
        "encoder_sparse": SparseBlocks("num_sparse_encoder_layers", "num_layers", "encoder_sparse_step"),
        "decoder_sparse": SparseBlocks("num_sparse_decoder_layers", "num_decoder_layers", "decoder_sparse_step"),
        "expert_capacity": Field("expert_capacity"), "router_bias": Field("router_bias"),
        "router_dtype": Field("router_dtype"), "tied_head": Field("tie_word_embeddings"),
    },
    without_effect=("router_z_loss_coef", "router_ignore_padding_tokens", "add_router_probs", "is_encoder_decoder",
                    "is_decoder", "add_cross_attention"),
)  # fmt: skip
"""How the config of Switch Transformers stores every trait of a T5 with experts."""
_TRAITS = tuple(SWITCH.differs)


def is_switch(model: nn.Module) -> bool:
    """Whether a model is a T5, or Switch Transformers, with a language-modelling head."""
    names = ("T5ForConditionalGeneration", "SwitchTransformersForConditionalGeneration")
    return getattr(architecture_of(model), "__name__", "") in names


def switch_spec(model: Any) -> ModelSpec:
    """Describe a T5 that `sparsify` made sparse, or a model of Switch Transformers, in the terms of the latter.

    Raises:
        Unsupported: a gated T5, or sparse layers that the class cannot express.
    """
    if has_adapters(model):
        raise Unsupported("it has adapters of PEFT; merge them first: model = model.merge_and_unload()")
    config, layers = model.config, moe_layers(model)
    stored = model.state_dict(keep_vars=True)
    tensors = {name: tensor.detach() for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    if config.model_type == SWITCH.model_type and not layers:
        return ModelSpec({trait: SWITCH.differs[trait].read(config) for trait in _TRAITS}, tensors)
    if not layers:
        raise Unsupported("it has no sparse layers of moeify")
    if config.model_type != "t5":
        raise Unsupported("its feed-forward networks were made sparse beside experts of its own")
    return _of_t5(config, layers, tensors, is_tied=stored["lm_head.weight"] is stored["shared.weight"])


def _of_t5(config: Any, layers: dict[str, MoE], tensors: dict[str, Tensor], *, is_tied: bool) -> ModelSpec:
    if config.is_gated_act:
        raise Unsupported(f"its networks are gated ({config.feed_forward_proj}), those of {SWITCH.title} are not")
    sparse: dict[str, list[int]] = {stack: [] for stack in _SPARSE}
    widths = set()
    for name, layer in layers.items():
        stack, block = _place(name)
        sparse[stack].append(block)
        router, up, down = _parts(layer, config.dense_act_fn)
        widths.add((len(up), up.shape[1]))
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
        inside = f"{name.removesuffix('DenseReluDense')}mlp"
        tensors[f"{inside}.router.classifier.weight"] = router.detach()
        for e in range(len(up)):
            tensors[f"{inside}.experts.expert_{e}.wi.weight"] = up[e].detach()
            tensors[f"{inside}.experts.expert_{e}.wo.weight"] = down[e].detach()
    if len(widths) > 1:
        raise Unsupported(f"all its layers have as many experts of one width, those of the model {sorted(widths)}")
    ((num_experts, width),) = widths
    traits = {name: getattr(config, name, None) for name in (*_SIZES, *_OTHERS)} | {
        "d_ff": config.d_ff, "expert_width": width, "num_experts": num_experts,
        "encoder_sparse": tuple(sorted(sparse["encoder"])), "decoder_sparse": tuple(sorted(sparse["decoder"])),
        "expert_capacity": _NO_CAPACITY, "router_bias": False, "router_dtype": "float32",
        "tied_head": config.scale_decoder_outputs,
    }  # fmt: skip
    if len(layers) == config.num_layers + config.num_decoder_layers:
        del traits["d_ff"]  # no network is dense
    if config.scale_decoder_outputs and not is_tied:
        raise Unsupported("it scales outputs as a head does that is tied to the embeddings, and its head is not")
    tensors = {name.replace(".DenseReluDense.", ".mlp."): tensor for name, tensor in tensors.items()}
    spec = ModelSpec(traits, tensors)
    if config.scale_decoder_outputs or not is_tied:
        return spec
    copies = {name: tensors["shared.weight"].clone() for name in _TIED}
    return spec.rewritten("the embeddings are written four times, for each of their uses", copies)


def _place(name: str) -> tuple[str, int]:
    """The stack and the block of a sparse layer."""
    found = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.DenseReluDense", name)
    if found is None or int(found[3]) != _SPARSE[found[1]]:
        raise Unsupported(f"its sparse layer {name} is no whole feed-forward network (DenseReluDense)")
    return found[1], int(found[2])


def _parts(layer: MoE, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """The router, and the up and down projections of the experts."""
    from transformers.activations import ACT2FN

    choice = token_choice_of(layer.router)
    wanted = {"k": 1, "score": "softmax", "normalize": False, "scale": 1.0, "selection_bias": False, "groups": None}
    if unlike := [name for name, value in wanted.items() if choice.traits[name] != value]:
        raise Unsupported(
            f"{SWITCH.title} multiplies one expert by its probability (top-1, softmax), and the model's router has "
            + ", ".join(f"{name}={choice.traits[name]}" for name in unlike)
        )
    if layer.shared is not None or layer.memory is not None:
        raise Unsupported(f"its sparse layers have more than experts, those of {SWITCH.title} have experts only")
    if type(layer.experts) is not FFN or not isinstance(layer.experts.activation, Plain):
        raise Unsupported(f"its experts, {type(layer.experts).__name__}, are not networks of two projections")
    (up, up_bias), (down, down_bias) = layer.experts.up, layer.experts.down
    if any(bias is not None and torch.any(bias) for bias in (up_bias, down_bias)):
        raise Unsupported("its experts have biases")
    x = torch.linspace(-6, 6, 97)
    if not torch.equal(ACT2FN[act](x), layer.experts.activation.act(x)):
        raise Unsupported(f"the activation of its experts is not that of the dense model, {act}")
    return choice.router, up, down
