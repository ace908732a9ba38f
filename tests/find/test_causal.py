from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from moeify import MoE, Recipe, sparsify
from moeify.find import named
from moeify.find.causal import is_causal_mask
from moeify.routers import ExpertChoice, Soft, TopK
from moeify.sparsify import fresh

SOFT = Recipe(num_experts=4, router=Soft, experts=fresh)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 16}
X = torch.randn(2, 6, 16)
MASK = nn.Transformer.generate_square_subsequent_mask(6)
IN_DECODER = r"is in a decoder, and Soft decides by looking at later tokens: .* allow_noncausal=True"


def encoder(batch_first=True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def sparse(model, recipe=SOFT, **options):
    return sparsify(model, recipe, verbose=False, **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_text_model_of_clip_is_a_decoder(attention):
    model = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, attn_implementation=attention))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=IN_DECODER):
        sparse(model)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert any(isinstance(part, MoE) for part in sparse(model, allow_noncausal=True).modules())


def test_the_image_model_of_clip_is_none():
    config = CLIPConfig(text_config=TEXT, vision_config={**SIZES, "image_size": 32, "patch_size": 8})
    with pytest.raises(ValueError, match=f"text_model.*{IN_DECODER}"):
        sparse(CLIPModel(config))
    model = sparse(CLIPModel(config), Recipe(where=named("vision"), num_experts=4, router=Soft, experts=fresh))
    ids, pixels = torch.tensor([[5, 6, 7, 2]]), torch.randn(1, 3, 32, 32)
    model(input_ids=ids, pixel_values=pixels).logits_per_image.sum().backward()


CALLS = {
    "a mask": {"mask": MASK},
    "a mask of bools": {"mask": MASK.isinf()},
    "a mask and the word": {"mask": MASK, "is_causal": True},
    "a mask per head": {"mask": MASK.expand(4, 6, 6)},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("router", [Soft, ExpertChoice, partial(TopK, per="sequence")])
def test_an_encoder_of_torch_is_a_decoder_once_it_is_called_with_a_causal_mask(router, call, training):
    model = sparse(encoder(), Recipe(num_experts=4, router=router, experts=fresh)).train(training)
    model(X)
    with pytest.raises(ValueError, match="is in a decoder"):
        model(X, **call)
    model(X)


def test_a_causal_router_and_whoever_allows_the_other_may_have_any_mask():
    sparse(encoder(), Recipe(num_experts=4, router=TopK, experts=fresh))(X, mask=MASK)
    sparse(encoder(), allow_noncausal=True)(X, mask=MASK)


def test_other_masks_hide_no_future():
    model = sparse(encoder())
    window = (torch.arange(6)[:, None] - torch.arange(6)).abs() > 2
    model(X, mask=window)
    model(X, mask=torch.zeros(6, 6))
    model(X, src_key_padding_mask=torch.arange(6).expand(2, 6) > 3)
    model(torch.randn(2, 16, 16))  # as many tokens as features


class Block(nn.Module):
    """A layer as people write it, which keeps its mask to itself."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.attention(x, x, x, attn_mask=MASK[: x.shape[1], : x.shape[1]], need_weights=False)[0]
        return x + self.ffn(x)


def test_a_mask_inside_a_layer_is_found_at_conversion():
    with pytest.raises(ValueError, match=rf"0\.ffn\.0 {IN_DECODER}"):
        sparse(nn.Sequential(Block(), Block()))


def conventions(seen):
    """The mask of transformers, torch's, and the one that is added to scores."""
    return seen, ~seen, torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


@given(n=st.integers(2, 6), batch=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_causal_masks_hide_all_later_tokens_and_not_all_others(n, batch, seed):
    random = torch.rand(batch, 1, n, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    causal = random.tril()
    causal[0, 0, -1] = True  # the last token of one sequence sees itself and the first
    assert all(map(is_causal_mask, conventions(causal)))
    causal[-1, 0, 0, -1] = True
    assert not any(map(is_causal_mask, conventions(causal)))


@given(n=st.integers(2, 6), batch=st.integers(1, 3), real=st.integers(1, 6))
def test_padding_is_no_causal_mask(n, batch, real):
    seen = (torch.arange(n) < real).expand(batch, 1, n, n)
    assert not any(map(is_causal_mask, conventions(seen)))
    assert not any(map(is_causal_mask, conventions(seen.flip(-1))))


def test_a_guarded_model_can_be_saved_whole(tmp_path):
    model = sparse(encoder())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with pytest.raises(ValueError, match="is in a decoder"):
        again(X, mask=MASK)
