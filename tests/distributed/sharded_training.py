"""A small training with experts on ranks of their own, by hand: FSDP2 over all ranks, whole experts over some."""

from __future__ import annotations

import hashlib

import torch
from torch import distributed as dist
from torch import nn

WIDTH, EXPERTS, BATCH = 8, 4, 8


class Experts(nn.Module):
    """All experts on every token; each rank computes with the weights of all, and keeps its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x, gate):
        up, down = _whole(self.up), _whole(self.down)
        return torch.einsum("te,tef,efd->td", gate, torch.einsum("td,edf->tef", x, up).relu(), down).clone()


def _whole(weight):
    from torch.distributed.tensor import DTensor, Partial

    return weight.full_tensor(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), Experts()
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x):
        return x + self.experts(x, (self.router(x) + self.bias).softmax(-1))


class Model(nn.Module):
    """Two layers, the head tied to the embedding, one weight that the ranks cannot share equally."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(11, WIDTH), nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids).flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(ranks=1, ep=1, change=None):
    """A model, sharded over more than one rank, and its optimizer; or one that differs in something."""
    torch.manual_seed(0)
    model = Model()
    if change == "name":
        model.more = nn.Linear(WIDTH, 1)
    elif change == "shape":
        model.embedding.weight = model.head.weight = nn.Parameter(torch.randn(12, WIDTH))
    elif change == "dtype":
        model.double()
    elif change == "frozen":
        model.layers[0].router.weight.requires_grad_(False)
    if ranks > 1:
        place(model, ranks, ep)
    decayed = [p for n, p in model.named_parameters() if "experts" in n]
    others = [p for n, p in model.named_parameters() if "experts" not in n and p.requires_grad]
    if change == "groups":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, foreach=False)


def place(model, ranks, ep):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    world = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    sparse = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("efsdp", "ep"))
    for layer in model.layers:
        if ep > 1:
            for name in ("up", "down"):
                whole = getattr(layer.experts, name).detach()
                setattr(layer.experts, name, nn.Parameter(distribute_tensor(whole, sparse["ep"], [Shard(0)])))
            fully_shard(layer.experts, mesh=sparse["efsdp"])
            layer.experts.set_gradient_divide_factor(float(ranks))
            if ranks // ep > 1:
                layer.experts.set_force_sum_reduction_for_comms(True)
        fully_shard(layer, mesh=world)
    fully_shard(model, mesh=world)


def train(model, optimizer, first, last, rank=0, ranks=1):
    """The loss of every step, over all ranks; data are a function of the step."""
    losses = []
    for step in range(first, last):
        ids = torch.randint(11, (BATCH, 5), generator=torch.Generator().manual_seed(step))
        mine = ids.chunk(ranks)[rank]
        loss = nn.functional.cross_entropy(model(mine[:, :-1]), mine[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for layer in model.layers:
                layer.bias += 0.01 * torch.arange(EXPERTS)
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append((total / ranks).item())
    return losses


def digest(model, optimizer):
    """SHA-256 of every whole tensor of model and optimizer, and of the settings of every parameter."""
    tensors = dict(model.state_dict())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            settings[name] = sorted((key, value) for key, value in group.items() if key != "params")
            tensors |= {f"{name}|{key}": value for key, value in optimizer.state[parameter].items()}
    found = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name in sorted(tensors):
        tensor = whole(tensors[name])
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def whole(tensor):
    """All of a tensor, on every rank."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
