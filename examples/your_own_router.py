"""A router of your own is one class: tokens in, a routing decision out. Nothing has to be registered."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Assignment, Context, Recipe, assign, record, sparsify
from moeify.routers import Router
from moeify.routers.base import project, real_tokens


class Cosine(Router):
    """Every token takes the k experts whose direction is nearest to its own (X-MoE, arXiv 2204.09179).

    s = softmax(cos(P x, e_j) / τ)      P (C, D) projects, e (E, C) are the experts' directions, τ is learned
    """

    preserving = True  # the weights of a token sum to 1, so copied experts compute what the dense network did

    def __init__(self, width: int, num_experts: int, *, k: int = 2, channels: int = 8) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.projection = nn.Parameter(torch.randn(channels, width) * width**-0.5)
        self.directions = nn.Parameter(torch.randn(num_experts, channels))
        self.temperature = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        tokens, positions = real_tokens(x, context)  # padding is not routed
        heading = F.normalize(project(tokens, self.projection), dim=-1)
        logits = project(heading, F.normalize(self.directions.float(), dim=-1)) / self.temperature.float()
        scores = logits.softmax(-1)
        gates, index = scores.topk(self.k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        return assign(
            index, gates, self.num_experts, shape=x.shape[:-1], positions=positions, logits=logits, scores=scores
        )


torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
sparsify(model, Recipe(num_experts=8, router=Cosine))

with record(model) as decisions:
    model(torch.randint(256, (2, 16)))
for layer, decision in decisions.items():
    print(layer, "rows per expert:", decision.counts.tolist())
