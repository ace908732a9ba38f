"""`balance_hook`: the gradient of balancing losses in a training loop whose loss cannot be changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from moeify import ranks
from moeify.record import observe
from moeify.train.arguments import SparseArguments
from moeify.train.empty import is_padding
from moeify.train.freeze import require_learning_routers
from moeify.train.loss import StepLoss, Watch, count_decisions, disable_own_loss


def balance_hook(
    model: nn.Module, sparse: SparseArguments | None = None, *, scale: Callable[[], float] = lambda: 1.0
) -> BalanceHook:
    """Add the balancing losses of `SparseTrainer` to the gradient of whatever loss a model is trained by.

        hook = balance_hook(model, SparseArguments(balance=1e-2))
        for batches in steps:
            hook.begin(batches)
            for batch in batches:
                my_loss(model(**batch)).backward()
            optimizer.step()
            hook.end()

    The outputs of the model keep their values; in backward, they give the routers the balance's gradient too. It is the
    same however a step is cut into micro-batches and ranks, padded or packed, and however the loop scales its own loss.
    The balance loss of transformers' own MoE models is turned off, since it would count twice.

    Args:
        model: ours, or an MoE of transformers; the one that the loop calls, or one that this one wraps.
        sparse: the losses and their weights. A controller and expert dropout are attached by themselves:
            `moeify.balance.control(model, optimizer, rule)` and `moeify.train.ExpertDropout`.
        scale: what the loop multiplies losses by before backward and divides gradients by after it, such as
            `GradScaler.get_scale` for fp16.

    Raises:
        ValueError: a model without a sparse layer, or whose routers are frozen; in training, a step in which no
            decision was seen, or whose backward pass did not reach the outputs of the model.
    """
    return BalanceHook(model, SparseArguments() if sparse is None else sparse, scale)


class BalanceHook:
    """The running hook of a model, made by `balance_hook`; `remove()` ends it.

    Attributes:
        sparse: the losses and their weights.
        step: optimizer steps done, of which weights may be schedules.
        found_own_loss: whether the model had a balance loss of its own turned on.
    """

    def __init__(self, model: nn.Module, sparse: SparseArguments, scale: Callable[[], float]) -> None:
        if sparse.balance != 0 or sparse.z != 0:
            require_learning_routers(model)
        self.sparse, self.step = sparse, 0
        self._scale, self._step_loss, self._watch = scale, StepLoss(sparse.scope), Watch()
        self._names = list(inspect.signature(model.forward).parameters)
        self._sizes: dict[str, int] = {}
        self._counts = False
        self._added = self._arrived = 0
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            *observe(model, self._watch.observe),
            model.register_forward_hook(self._after),
        ]
        self.found_own_loss = disable_own_loss(model)

    @property
    def loads(self) -> dict[str, Float[Tensor, "E"]]:
        """The rows that the last step assigned to the experts of each layer, which a checkpoint holds."""
        return self._step_loss.assigned

    @loads.setter
    def loads(self, loads: dict[str, Float[Tensor, "E"]]) -> None:
        self._step_loss.assigned = loads

    def begin(
        self, batches: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu", *, copies: int = 1
    ) -> None:
        """Count the tokens of the micro-batches of a step, before the first of them is computed.

        Args:
            batches: of this rank, as the model is called with them.
            device: where ranks exchange their counts.
            copies: ranks that receive the same batches, as in tensor parallelism.

        Raises:
            TypeError: a batch that is not a mapping from names to tensors, whose tokens cannot be counted.
        """
        if odd := next((batch for batch in batches if not isinstance(batch, Mapping)), None):
            raise TypeError(
                f"a batch is a {type(odd).__name__} and no inputs of the model, so its tokens cannot be counted before "
                "the step, as for trainers that generate; those of TRL are in moeify.integrations.trl"
            )
        self._copies, self._added, self._arrived = copies, 0, 0
        self._step_loss.begin(batches, device, copies=copies)

    def check(self) -> None:
        """Raise if the gradients of a step lack the balance; call it after the last backward pass, or let `end` do so.

        Raises:
            ValueError: no forward pass with gradients went through the model, or no backward pass through its outputs.
        """
        if not self._added or not self._arrived:
            missing = "forward pass in training mode" if not self._added else "backward pass"
            raise ValueError(
                f"no {missing} of this step went through the outputs of the model that was hooked, so balance is not "
                "wired; hook the module that the loop calls, and call begin() before each step"
            )

    def gather(self) -> None:
        """Sum the loads of the step over all ranks ahead of `end`, which then needs no other rank.

        Raises:
            ValueError: as of `check`.
        """
        self.check()
        self._step_loss.gather()
        for target in self.sparse.targets:
            target.gather()

    def forget(self) -> None:
        """Drop the loads of a step that the optimizer does not take; those of the step before stay the next one's f."""
        for target in self.sparse.targets:
            target.forget()

    def end(self) -> None:
        """The optimizer has stepped: the loads of this step are the f of the next.

        Raises:
            ValueError: as of `check`.
        """
        self.check()
        self._step_loss.end()
        for target in self.sparse.targets:
            target.step()
        self.step += 1

    @property
    def loads(self) -> dict[str, Float[Tensor, "E"]]:
        """The rows assigned to every expert of every layer in the step before, of which f is made; may be set."""
        return self._step_loss.assigned

    @loads.setter
    def loads(self, assigned: dict[str, Float[Tensor, "E"]]) -> None:
        self._step_loss.assigned = assigned

    def remove(self) -> None:
        """Leave the model as it was, but for its own balance loss, which stays off."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._watch.forget()
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        self._sizes, self._counts = count_decisions(inputs), not is_padding(inputs)

    def _after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return output
        decisions = self._watch.take()
        self._step_loss.add(decisions, counts=self._counts)
        self._added += 1
        extra = self._step_loss.weighted(self.sparse, self.step, decisions, self._sizes) if self._counts else None
        if extra is None:
            self._arrived += 1
            return output
        return self._with_gradient(output, extra * (ranks.count() // self._copies))

    def _with_gradient(self, output: Any, extra: Float[Tensor, ""]) -> Any:
        leaves, structure = tree_flatten(output)
        learning = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        outputs = _WithGradient.apply(self, extra, *(leaves[i] for i in learning))
        for i, leaf in zip(learning, outputs, strict=True):
            leaves[i] = leaf
        return tree_unflatten(leaves, structure)


class _WithGradient(torch.autograd.Function):
    """The identity on the outputs of a model; in backward, a loss beside them gets its gradient as well."""

    @staticmethod
    def forward(ctx: Any, hook: BalanceHook, extra: Float[Tensor, ""], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.hook, ctx.device, ctx.dtype = hook, extra.device, extra.dtype
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.hook._arrived += 1
        return None, torch.tensor(ctx.hook._scale(), device=ctx.device, dtype=ctx.dtype), *gradients
