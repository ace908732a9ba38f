"""Names of the attributes that hold E, K and the like in the configurations and modules of transformers' families."""

from __future__ import annotations

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "top_k")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
QUERY_WIDTH = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
VALUE_WIDTH = ("v_head_dim", *QUERY_WIDTH)
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")
EXPERT_GROUPS = ("num_group", "topk_group")
"""How many groups of experts there are, and how many of them a token may use."""
FLAT_WEIGHTS = ("w1", "v1", "w2")
"""Expert weights that DBRX stacks in two dimensions, (E · H, D)."""

EXPERT_PARALLEL = "_moeify_expert_parallel"
"""The attribute of experts that `DistributedConfig` divided, which holds what sends their rows."""


def number(owner: object, names: tuple[str, ...]) -> int | float | None:
    """The first of the attributes that is a number, None if none is."""
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, (int, float))), None)
