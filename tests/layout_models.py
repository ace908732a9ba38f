"""Tiny models whose tokens need care: sequence first (XLNet), pooled at padding (SigLIP), padded images (Idefics2)."""

from transformers import Idefics2Config, Idefics2Model, SiglipTextConfig, SiglipTextModel, XLNetConfig, XLNetModel

from tiny_models import widened


def xlnet() -> XLNetModel:
    return widened(XLNetModel(XLNetConfig(vocab_size=256, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval())


def siglip() -> SiglipTextModel:
    config = SiglipTextConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return widened(SiglipTextModel(config).eval())


def idefics2() -> Idefics2Model:
    """Images of 4 x 4 patches at most, smaller ones padded; two latents of each stand among 32 words."""
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "initializer_range": 0.3,
    }  # fmt: skip
    perceiver = {"resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
    config = Idefics2Config(
        vision_config=vision, perceiver_config=perceiver | {"num_key_value_heads": 1, "hidden_size": 16},
        text_config=text | {"num_attention_heads": 2, "num_key_value_heads": 1}, image_token_id=30,
    )  # fmt: skip
    return Idefics2Model(config).eval()
