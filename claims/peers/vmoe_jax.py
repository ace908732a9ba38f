"""What google-research/vmoe answers to the inputs of `claims/independent.py`; runs where jax and flax are installed.

python vmoe_jax.py INPUTS.npz ANSWERS.npz FOLDER      FOLDER is a checkout of the repository
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def answer(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights, outputs, gradients and losses of every case, under `case/quantity`."""
    from vmoe import moe

    answers = _by_routers(given) | _by_soft_router(given)
    answers["capacity"] = np.array([
        moe.compute_capacity(int(tokens * k), int(experts), float(factor))
        for factor, tokens, experts, k in given["capacity"]
    ])  # fmt: skip
    return {name: np.asarray(value) for name, value in answers.items()}


def _routers(given: dict[str, np.ndarray]) -> dict[str, tuple]:
    """The routers by case, and the tokens that each is given."""
    from vmoe.nn.routing import NoisyTopExpertsPerItemRouter, NoisyTopItemsPerExpertRouter

    experts = len(given["up"])
    one = given["x"][:1]
    by_item = partial(NoisyTopExpertsPerItemRouter, experts, gshard_loss_weight=1.0)

    def limited(factor: float, *, first: bool) -> dict:
        return {"name": "einsum", "capacity_factor": factor, "batch_priority": first}

    return {
        "top-2": (by_item(2, deterministic=True, dispatcher=limited(0.7, first=False)), one),
        "top-1": (by_item(1, deterministic=True, dispatcher=limited(0.5, first=False)), one),
        "top-1 batch priority": (by_item(1, deterministic=True, dispatcher=limited(0.5, first=True)), one),
        "top-2 batch priority": (by_item(2, deterministic=True, dispatcher=limited(0.7, first=True)), one),
        "top-2 of groups": (by_item(2, deterministic=True, dispatcher=limited(0.7, first=False)), given["x"]),
        "top-2 of groups of 2": (
            by_item(2, deterministic=True, dispatcher=limited(0.7, first=False)),
            given["x"].reshape(-1, 2 * given["x"].shape[1], given["x"].shape[2]),
        ),
        "noisy top-2": (by_item(2, noise_std=1.0, dispatcher=limited(0.7, first=False)), one),
        "expert choice": (
            NoisyTopItemsPerExpertRouter(
                experts,
                deterministic=True,
                dispatcher={"name": "einsum", "capacity_factor": 1.7, "capacity_multiple_of": None},
            ),
            given["x"],
        ),
        "expert choice by 4": (
            NoisyTopItemsPerExpertRouter(
                experts, deterministic=True, dispatcher={"name": "einsum", "capacity_factor": 1.7}
            ),
            given["x"],
        ),
    }


def _by_routers(given: dict[str, np.ndarray]) -> dict[str, Any]:
    answers = {}
    for case, (router, x) in _routers(given).items():
        leaves = {"x": x, **{name: given[name] for name in ("router", "up", "down")}}

        def layer(leaves: dict, router: object = router) -> tuple:
            params = {"dense": {"kernel": leaves["router"].T}}
            dispatcher, losses = router.apply({"params": params}, leaves["x"], rngs={"gating": jax.random.key(0)})
            return _run(dispatcher, leaves), (dispatcher.combine_weights.sum(-1), losses)

        with _noise(given["noise"]):
            y, (weights, losses), gradients = _with_gradients(layer, leaves, given["direction"])
        answers |= {f"{case}/weights": weights, f"{case}/y": y}
        answers |= {f"{case}/grad {name}": value for name, value in gradients.items()}
        answers |= {f"{case}/{name}": jnp.mean(value) for name, value in losses.items() if name.endswith("_loss")}
    return answers


def _by_soft_router(given: dict[str, np.ndarray]) -> dict[str, Any]:
    from vmoe.projects.soft_moe.router import SoftRouter

    answers = {}
    soft = SoftRouter(len(given["up"]), num_slots=given["slots"].shape[1])
    leaves = {"x": given["x"], **{name: given[name] for name in ("slots", "scale", "up", "down")}}
    for case in ("soft", "soft as shipped"):

        def mixed(leaves: dict, case: str = case) -> tuple:
            params = {"mu": jnp.moveaxis(leaves["slots"], -1, 0), "scale": leaves["scale"]}
            dispatcher, _ = soft.apply({"params": params}, leaves["x"])
            y = _run(dispatcher if case == "soft as shipped" else dispatcher.dispatcher, leaves)
            return y, (dispatcher.dispatcher.dispatch_weights, dispatcher.dispatcher.combine_weights)

        y, (into, out_of), gradients = _with_gradients(mixed, leaves, given["direction"])
        answers |= {f"{case}/into": into, f"{case}/out_of": out_of, f"{case}/y": y}
        answers |= {f"{case}/grad {name}": value for name, value in gradients.items()}
    return answers


def _run(dispatcher: object, leaves: dict) -> jax.Array:
    rows = dispatcher.dispatch(leaves["x"])
    hidden = jax.nn.gelu(jnp.einsum("erd,ehd->erh", rows, leaves["up"]), approximate=False)
    return dispatcher.combine(jnp.einsum("erh,edh->erd", hidden, leaves["down"]))


def _with_gradients(layer: Callable, leaves: dict, direction: np.ndarray) -> tuple:
    def projected(leaves: dict) -> tuple:
        y, aux = layer(leaves)
        return (y * direction.reshape(-1, *y.shape[1:])[: len(y)]).sum(), (y, aux)

    leaves = {name: jnp.asarray(value) for name, value in leaves.items()}
    gradients, (y, aux) = jax.grad(projected, has_aux=True)(leaves)
    return y, aux, gradients


class _noise:
    """Every normal draw is the given one."""

    def __init__(self, noise: np.ndarray) -> None:
        self.noise, self.draw = noise, jax.random.normal

    def __enter__(self) -> None:
        jax.random.normal = lambda key, shape, dtype=float: jnp.asarray(self.noise).reshape(shape)

    def __exit__(self, *_: object) -> None:
        jax.random.normal = self.draw


if __name__ == "__main__":
    inputs, answers, folder = sys.argv[1:]
    sys.path.insert(0, folder)
    jax.config.update("jax_platforms", "cpu")
    found = answer(dict(np.load(inputs)))
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    np.savez(answers, version=f"{commit[:12] or 'no commit'} on jax {jax.__version__}", **found)
