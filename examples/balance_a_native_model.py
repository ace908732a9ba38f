"""Balance a mixture-of-experts model that transformers ships, without changing the model."""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

from moeify import record
from moeify.balance import Sign, control
from moeify.losses import balance, load_loss, z

torch.manual_seed(0)
sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
tokens = torch.randint(256, (4, 32))

mixtral = MixtralForCausalLM(
    MixtralConfig(**sizes, intermediate_size=64, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2)
)
optimizer = torch.optim.AdamW(mixtral.parameters(), lr=1e-3)
with record(mixtral) as decisions:
    loss = mixtral(tokens, labels=tokens).loss
    layers = list(decisions.values())
    loss = loss + 1e-2 * sum(map(balance, layers)) / len(layers) + 1e-3 * sum(map(z, layers)) / len(layers)
    loss.backward()
    optimizer.step()
print("rows per expert:", {name: decision.counts.tolist() for name, decision in decisions.items()})

deepseek = DeepseekV3ForCausalLM(
    DeepseekV3Config(
        **sizes, intermediate_size=64, moe_intermediate_size=16, first_k_dense_replace=1, num_key_value_heads=4,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
    )
).train()  # fmt: skip
optimizer = torch.optim.AdamW(deepseek.parameters(), lr=1e-4)
controller = control(deepseek, optimizer, Sign(rate=1e-3))
unevenness = []
with record(deepseek) as decisions:
    for _ in range(30):
        optimizer.zero_grad()
        deepseek(tokens, labels=tokens).loss.backward()
        optimizer.step()  # and then the controller moves the biases
        unevenness += [load_loss(decision).item() for decision in decisions.values()]
controller.remove()
print(f"squared coefficient of variation of the load: {unevenness[0]:.3f} at first, {unevenness[-1]:.3f} at last")
