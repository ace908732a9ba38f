"""What soft-moe-pytorch and st-moe-pytorch answer to the inputs of `claims/independent.py`, where they are installed.

python lucidrains.py INPUTS.npz ANSWERS.npz
"""

import sys
from importlib.metadata import version
from unittest.mock import patch

import numpy as np
import torch
from soft_moe_pytorch import SoftMoE
from st_moe_pytorch import MoE
from torch import Tensor, nn


def answer(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of every case, under `case/quantity`."""
    experts, hidden, width = given["up"].shape
    answers = {}
    soft = SoftMoE(width, num_experts=experts, num_slots=given["slots"].shape[1], expert_mult=hidden / width)
    _set(soft.slot_embeds, given["slots"])
    for e, expert in enumerate(soft.experts.experts):
        for linear, name in ((expert[0], "up"), (expert[3], "down")):
            _set(linear.weight, given[name][e])
            _set(linear.bias, given[f"{name}_bias"][e])
    for case, mask in (("soft", None), ("soft with padding", given["mask"])):
        x = given["x"].clone().requires_grad_()
        y = soft(x, mask=mask)
        real = slice(None) if mask is None else mask
        (y[real] * given["direction"][real]).sum().backward()
        answers |= {f"{case}/y": y[real], f"{case}/grad x": x.grad, f"{case}/grad slots": soft.slot_embeds.grad}
        answers[f"{case}/grad up"] = torch.stack([expert[0].weight.grad for expert in soft.experts.experts])
        soft.zero_grad()

    for case, options in {
        "top-2": {"straight_through_dispatch_tensor": False},
        "top-2 straight-through": {},
        "top-2 of groups": {"straight_through_dispatch_tensor": False},
        "top-2 multiplicative bias": {"straight_through_dispatch_tensor": False},
    }.items():
        sparse = MoE(
            width, num_experts=experts, expert_hidden_mult=hidden * 1.5 / width, capacity_factor_train=0.8, **options
        )
        _set(sparse.gate.to_gates.weight, given["router"])
        for e, expert in enumerate(sparse.experts.experts):
            _set(expert.net[0].weight, given["gate_up"][e].roll(hidden, 0))
            _set(expert.net[0].bias, given["gate_up_bias"][e].roll(hidden, 0))
            if case.endswith("multiplicative bias"):
                _set(expert.net[1].mult_bias, given["multiplicative_bias"][e])
            _set(expert.net[2].weight, given["down"][e])
            _set(expert.net[2].bias, given["down_bias"][e])
        x = (given["x"] if case.endswith("groups") else given["x"][:1]).clone().requires_grad_()
        draws = given["draws"][: len(x)]
        drawn = torch.stack([draws, draws])  # (K, B, N)
        with patch.object(torch.Tensor, "uniform_", lambda self, *_, drawn=drawn: self.copy_(drawn)):
            found = sparse(x)
        (found.outputs * given["direction"][: len(x)]).sum().backward()
        answers |= {f"{case}/y": found.outputs, f"{case}/balance": found.balance_loss, f"{case}/z": found.router_z_loss}
        answers |= {f"{case}/grad x": x.grad, f"{case}/grad router": sparse.gate.to_gates.weight.grad}
        gate_up = [expert.net[0].weight.grad.roll(hidden, 0) for expert in sparse.experts.experts]
        answers[f"{case}/grad gate_up"] = torch.stack(gate_up)
        if case.endswith("multiplicative bias"):
            bias = torch.stack([expert.net[1].mult_bias.grad for expert in sparse.experts.experts])
            answers[f"{case}/grad multiplicative_bias"] = bias
    return answers


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


if __name__ == "__main__":
    inputs, answers = sys.argv[1:]
    found = answer({name: torch.from_numpy(value) for name, value in np.load(inputs).items()})
    versions = ", ".join(f"{name} {version(name)}" for name in ("soft-moe-pytorch", "st-moe-pytorch"))
    np.savez(answers, version=versions, **{name: value.detach().numpy() for name, value in found.items()})
