"""What deepctr-torch's PLE answers to the inputs of `claims/independent.py`, where it is installed.

python deepctr.py INPUTS.npz ANSWERS.npz
"""

import sys
from importlib.metadata import version

import numpy as np
import torch
from deepctr_torch.inputs import DenseFeat
from deepctr_torch.models.multitask.ple import PLE
from torch import Tensor, nn


def answer(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features of the tasks, and gradients, of every number of levels, under `case/quantity`."""
    answers = {}
    (tasks, private), x = given["private"].tolist(), given["features"]
    for levels in (1, 2, 3):
        hidden, out = given["ple 0 up"].shape[1], given["ple 0 down"].shape[1]
        model = PLE(
            [DenseFeat("x", x.shape[1])], shared_expert_num=private, specific_expert_num=private, num_levels=levels,
            expert_dnn_hidden_units=(hidden, out), gate_dnn_hidden_units=(), tower_dnn_hidden_units=(),
            task_types=("regression",) * tasks, task_names=tuple("abcdef"[:tasks]),
        )  # fmt: skip
        leaves: dict[str, list[nn.Parameter]] = {}
        for level in range(levels):
            specific = [expert for of_task in model.specific_experts[level] for expert in of_task]
            linears = [expert.linears for expert in [*specific, *model.shared_experts[level][0]]]
            name = f"ple {level}"
            leaves[f"{name} up"] = [each[0].weight for each in linears]
            leaves[f"{name} up_bias"] = [each[0].bias for each in linears]
            leaves[f"{name} down"] = [each[1].weight for each in linears]
            leaves[f"{name} down_bias"] = [each[1].bias for each in linears]
            leaves[f"{name} gates"] = [gate.weight for gate in model.specific_gate_dnn_final_layer[level]]
            if level < levels - 1:
                leaves[f"{name} shared_gate"] = [model.shared_gate_dnn_final_layer[level].weight]
        with torch.no_grad():
            for name, parameters in leaves.items():
                for parameter, value in zip(parameters, given[name], strict=True):
                    parameter.copy_(value)
        features: list[Tensor] = []
        for tower in model.tower_dnn_final_layer:
            tower.register_forward_hook(lambda module, args, output, kept=features: kept.append(args[0]))
        read = x.clone().requires_grad_()
        model(read)
        y = torch.stack(features, dim=1)
        (y * given["ple direction"]).sum().backward()
        case = f"ple of {levels} level{'s' * (levels > 1)}"
        answers |= {f"{case}/y": y, f"{case}/grad x": read.grad}
        answers |= {f"{case}/grad {name}": torch.stack([p.grad for p in leaf]) for name, leaf in leaves.items()}
    return answers


if __name__ == "__main__":
    inputs, answers = sys.argv[1:]
    found = answer({name: torch.from_numpy(value) for name, value in np.load(inputs).items()})
    stated = f"deepctr-torch {version('deepctr-torch')}"
    np.savez(answers, version=stated, **{name: value.detach().numpy() for name, value in found.items()})
