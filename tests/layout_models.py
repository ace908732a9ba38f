"""Tiny models whose tokens need care: laid out sequence first (XLNet), or pooled where padding may be (SigLIP)."""

from transformers import SiglipTextConfig, SiglipTextModel, XLNetConfig, XLNetModel

from tiny_models import widened


def xlnet() -> XLNetModel:
    return widened(XLNetModel(XLNetConfig(vocab_size=256, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval())


def siglip() -> SiglipTextModel:
    config = SiglipTextConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return widened(SiglipTextModel(config).eval())
