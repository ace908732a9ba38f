"""A router of your own is one class: tokens in, a routing decision out. Nothing has to be registered."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Assignment, Context, Evidence, Recipe, record, sparsify
from moeify.routers import Router, project, real_tokens


class Deep(Router):
    """Every token takes the k experts that a small network of two layers prefers.

    s = softmax(V · tanh(W x));  g = the k largest of s, divided by their sum
    """

    weights_sum_to_one = True  # the weights of a token sum to 1, so copied experts compute what the dense network did

    def __init__(self, width: int, num_experts: int, *, k: int = 2, hidden: int = 16) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.first = nn.Parameter(torch.randn(hidden, width) * width**-0.5)
        self.second = nn.Parameter(torch.randn(num_experts, hidden) * hidden**-0.5)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        tokens = real_tokens(x, context)  # padding is not routed
        logits = project(project(tokens.x, self.first).tanh(), self.second)  # in fp32
        scores = logits.softmax(-1)
        weights, indices = scores.topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return tokens.assign(indices, weights, self.num_experts, Evidence(logits=logits, scores=scores))


torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
sparsify(model, Recipe(num_experts=8, router=Deep))

with record(model) as decisions:
    model(torch.randint(256, (2, 16)))
for layer, decision in decisions.items():
    print(layer, "rows per expert:", decision.counts.tolist())
