# pyrefly: ignore-errors
"""Mixtures of experts in plain PyTorch, for the modelling file that `save` writes; it does not import moeify.

Parameters have the same names and shapes as in the layers of moeify.
"""

import sys
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn import functional as F

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Router(nn.Module):
    """Selects the top-k experts of every token, in fp32.

    s = score(W x);  c = s + selection_bias (or W x + selection_bias);  i = topk(c, k);  g = s[i] / sum(s[i]) · scale
    """

    def __init__(self, width, num_experts, *, k, score, select, normalize, scale, bias, selection_bias, expert_groups):
        super().__init__()
        self.num_experts = num_experts
        self.k, self.score, self.select, self.normalize, self.scale = k, SCORES[score], select, normalize, scale
        self.expert_groups = expert_groups
        self.weight = nn.Parameter(torch.randn(num_experts, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)

    def forward(self, hidden_states):
        """The logits (T, E) of tokens (T, D), the weights of their selected experts (T, k), and these experts."""
        with ExitStack() as exact:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    exact.enter_context(torch.autocast(device, enabled=False))
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(hidden_states.float(), self.weight.float(), bias)
        scores = self.score(logits)
        choice = scores if self.select == "score" else logits
        if self.selection_bias is not None:
            choice = choice + self.selection_bias
        if self.expert_groups is not None:
            choice = best_groups(choice, **self.expert_groups)
        experts = choice.topk(self.k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scale, experts


def best_groups(choice, count, keep, reduce):
    """Mask all experts but those of each token's `keep` best groups out of `count` (group-limited routing)."""
    by_group = choice.unflatten(-1, (count, -1))
    best = 1 if reduce == "max" else min(2, by_group.shape[-1])
    kept = by_group.topk(best, dim=-1).values.sum(-1).topk(keep, dim=-1).indices
    other = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(-1, kept, False)
    return by_group.masked_fill(other.unsqueeze(-1), float("-inf")).flatten(-2)


class Experts(nn.Module):
    """Feed-forward networks, stacked over the experts."""

    def __init__(self, width, num_experts, *, hidden, width_out, bias, gated, activation, dropout):
        super().__init__()
        self.activate, self.dropout = activate(activation, gated), dropout
        self.up = "gate_up_proj" if gated else "up_proj"
        rows = 2 * hidden if gated else hidden
        for name, shape in {self.up: (rows, width), "down_proj": (width_out, hidden)}.items():
            weight = torch.empty(num_experts, *shape).uniform_(-1, 1) / shape[1] ** 0.5
            self.register_parameter(name, nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(num_experts, shape[0])) if bias else None)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """`Σ g_e · expert_e(x)` of tokens (T, D) over their experts (T, k) and weights (T, k)."""
        y = 0
        for expert in range(self.down_proj.shape[0]):
            token, rank = torch.where(top_k_index == expert)
            rows = self.network(hidden_states[token], expert)
            weighted = rows.float() * top_k_weights[token, rank, None]
            y = y + weighted.new_zeros(len(hidden_states), rows.shape[-1]).index_add(0, token, weighted)
        return y.to(hidden_states.dtype)

    def network(self, x, expert):
        """`down(act(up x))` of one expert."""
        hidden = self.activate(self.project(self.up, x, expert))
        return self.project("down_proj", F.dropout(hidden, self.dropout, self.training), expert)

    def project(self, name, x, expert):
        """One projection of one expert."""
        bias = getattr(self, f"{name}_bias")
        return F.linear(x, getattr(self, name)[expert], None if bias is None else bias[expert])


class DenseFFN(nn.Module):
    """The dense FFN as a shared expert, which computes every token."""

    def __init__(self, ups, down, *, gated, activation, dropout):
        super().__init__()
        self.ups, self.down = nn.ModuleList(ups), down
        self.activate, self.dropout = activate(activation, gated), dropout

    def forward(self, x):
        """`down(act(up x))`."""
        hidden = self.activate(torch.cat([up(x) for up in self.ups], dim=-1))
        return self.down(F.dropout(hidden, self.dropout, self.training))


def activate(activation, gated):
    """The activation between the projections: `act(up)`, or `act(gate) · up` of concatenated gate and up."""

    def activated(hidden):
        if not gated:
            return activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return activation(gate) * up

    return activated


class GatedDense(nn.Module):
    """The shared dense FFN times a sigmoid gate per token."""

    def __init__(self, dense, width):
        super().__init__()
        self.dense, self.gate = dense, nn.Linear(width, 1, bias=False)

    def forward(self, x):
        """`sigmoid(w · x) · dense(x)`."""
        return torch.sigmoid(self.gate(x)) * self.dense(x)


class MoE(nn.Module):
    """`Σ g_e · expert_e(x)` over the selected experts of a token, plus the shared expert.

    The router returns, and the experts take, what those of transformers do, so that vLLM can run its own for them.
    """

    def __init__(self, router, experts, shared=None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, hidden_states):
        """Outputs (..., O) of tokens (..., D); padding is computed like any token."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.router(tokens)
        y = self.experts(tokens, chosen, weights).view(*hidden_states.shape[:-1], -1)
        return y if self.shared is None else y + self.shared(hidden_states)


class Sparse:
    """Mixin for a class of transformers that replaces dense FFNs by mixtures of experts.

    `config.sites` lists the modules of each dense FFN, `config.sparse_layers` the settings of the layer replacing it.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.make_sparse(config)
        self.all_tied_weights_keys = ties_in(self, config.ties)
        self._keep_in_fp32_modules_strict |= {"router"}
        self.frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    def make_sparse(self, config):
        """Insert the sparse layers, unless the body is sparse already, built by `AutoModel` of a model with a head."""
        if not any(isinstance(part, MoE) for part in self.modules()):
            for site, layer in zip(config.sites, config.sparse_layers, strict=True):
                put(self, site, layer)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as in the base class; frozen parameters remain frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in model.frozen:
            model.get_parameter(name).requires_grad = False
        return loaded


def name_in(model, name):
    """The name in this model of a module or parameter of the saved model, whose head may differ or be missing."""
    prefix = model.base_model_prefix
    if hasattr(model, name.partition(".")[0]):
        return name
    return f"{prefix}.{name}" if hasattr(model, prefix) else name.removeprefix(f"{prefix}.")


def ties_in(model, ties):
    """The tied parameters of this model, each with the parameter that it is tied to."""
    own = {name_in(model, name): name_in(model, kept) for name, kept in ties.items()}
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: kept for name, kept in own.items() if {name, kept} <= there}


def put(model, site, layer):
    """Replace one dense FFN by a sparse layer."""

    def part(name):
        return model.get_submodule(name_in(model, name))

    width, num_experts, act = site["width"], layer["num_experts"], site["activation"]
    act = ACTIVATIONS[act["name"]] if "name" in act else getattr(part(act["module"]), act["attribute"])
    network = {"gated": site["gated"], "activation": act, "dropout": layer["dropout"]}
    shared = None
    if layer["shared"] != "nothing":
        shared = DenseFFN([part(up) for up in site["up"]], part(site["down"]), **network)
        shared.requires_grad_(layer["shared"] != "frozen")
        shared = GatedDense(shared, width) if layer["shared"] == "gated" else shared
    router = Router(width, num_experts, **layer["router"])
    moe = MoE(router, Experts(width, num_experts, **layer["experts"], **network), shared)
    parent, _, name = name_in(model, site["name"]).rpartition(".")
    after = site.get("after", 0.0)
    setattr(model.get_submodule(parent), name, nn.Sequential(moe, nn.Dropout(after)) if after else moe)
    for owner, attribute, value in site.get("disabled", []):
        setattr(part(owner), attribute, nn.Identity() if value is None else value)


def announce(architecture):
    """Set a class as an attribute of `transformers`, of all its copies in the process, for `transformers serve`."""
    holders = [vars(module).get("transformers") for module in [*sys.modules.values()] if hasattr(module, "__dict__")]
    for module in (sys.modules["transformers"], *holders):
        if getattr(module, "__name__", None) == "transformers":
            setattr(module, architecture.__name__, architecture)
