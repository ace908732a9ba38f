"""What MMoE and PLE of deepctr-torch answer to the inputs of `claims/independent.py`, where it is installed.

python deepctr.py INPUTS.npz ANSWERS.npz
"""

import sys
from collections.abc import Iterable
from importlib.metadata import version

import numpy as np
import torch
from deepctr_torch.inputs import DenseFeat
from deepctr_torch.models.multitask.mmoe import MMOE
from deepctr_torch.models.multitask.ple import PLE
from torch import Tensor, nn


def answer(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features of the tasks, and gradients, of MMoE and of PLE with every number of levels, under `case/quantity`."""
    (tasks, private), x = given["private"].tolist(), given["features"]
    hidden, out = given["ple 0 up"].shape[1], given["ple 0 down"].shape[1]
    columns = [DenseFeat("x", x.shape[1])]
    common = {
        "expert_dnn_hidden_units": (hidden, out), "gate_dnn_hidden_units": (), "tower_dnn_hidden_units": (),
        "task_types": ("regression",) * tasks, "task_names": tuple("abcdef"[:tasks]),
    }  # fmt: skip
    model = MMOE(columns, num_experts=len(given["ple 0 up"]), **common)
    leaves = of_experts("ple 0", model.expert_dnn) | {
        "mmoe gates": [gate.weight for gate in model.gate_dnn_final_layer]
    }
    answers = features("mmoe", model, leaves, given)
    for levels in (1, 2, 3):
        model = PLE(columns, shared_expert_num=private, specific_expert_num=private, num_levels=levels, **common)
        leaves = {}
        for level in range(levels):
            specific = [expert for of_task in model.specific_experts[level] for expert in of_task]
            name = f"ple {level}"
            leaves |= of_experts(name, [*specific, *model.shared_experts[level][0]])
            leaves[f"{name} gates"] = [gate.weight for gate in model.specific_gate_dnn_final_layer[level]]
            if level < levels - 1:
                leaves[f"{name} shared_gate"] = [model.shared_gate_dnn_final_layer[level].weight]
        answers |= features(f"ple of {levels} level{'s' * (levels > 1)}", model, leaves, given)
    return answers


def of_experts(name: str, experts: Iterable[nn.Module]) -> dict[str, list[nn.Parameter]]:
    """The parameters of experts of two linear layers, by their names in the inputs."""
    first, second = zip(*(expert.linears for expert in experts), strict=True)
    return {
        f"{name} up": [each.weight for each in first], f"{name} up_bias": [each.bias for each in first],
        f"{name} down": [each.weight for each in second], f"{name} down_bias": [each.bias for each in second],
    }  # fmt: skip


def features(
    case: str, model: nn.Module, leaves: dict[str, list[nn.Parameter]], given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the towers of the tasks read, and its gradients, once the leaves have the given values."""
    with torch.no_grad():
        for name, parameters in leaves.items():
            for parameter, value in zip(parameters, given[name], strict=True):
                parameter.copy_(value)
    seen: list[Tensor] = []
    for tower in model.tower_dnn_final_layer:
        tower.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x = given["features"].clone().requires_grad_()
    model(x)
    y = torch.stack(seen, dim=1)
    (y * given["ple direction"]).sum().backward()
    gradients = {name: torch.stack([parameter.grad for parameter in leaf]) for name, leaf in leaves.items()}
    return {f"{case}/y": y} | {f"{case}/grad {name}": grad for name, grad in {"x": x.grad, **gradients}.items()}


if __name__ == "__main__":
    inputs, answers = sys.argv[1:]
    found = answer({name: torch.from_numpy(value) for name, value in np.load(inputs).items()})
    stated = f"deepctr-torch {version('deepctr-torch')}"
    np.savez(answers, version=stated, **{name: value.detach().numpy() for name, value in found.items()})
