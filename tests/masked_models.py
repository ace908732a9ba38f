"""Small models with padding, and what their sparse layers route of it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Context, MoE
from moeify.experts import FFN
from moeify.routers import TopK
from strategies import sharpen

D, VOCABULARY = 16, 32


def sparse(context: Context, width_out: int = D, **options) -> MoE:
    moe = MoE(TopK(D, 4, **options), FFN(4, D, 8, width_out=width_out), context=context)
    sharpen(moe)
    return moe


def watched_tokens(moe: MoE) -> list[list[int]]:
    """The tokens, by flattened position, that the layer routes in every call to come."""
    seen = []
    moe.router.register_forward_hook(lambda module, args, routing: seen.append(routing.source.unique().tolist()))
    return seen


def real(mask: torch.Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def words(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape)


LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def decoder(**options) -> tuple[LlamaForCausalLM, MoE]:
    """A decoder of one sparse layer, whose router has these options, and that layer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    context = Context()
    moe = model.model.layers[0].mlp = sparse(context, **options)
    context.watch([model, model.model])
    return model, moe
