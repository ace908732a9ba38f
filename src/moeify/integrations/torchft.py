"""torchft for sparse models: replicas of a training, any of which may die in any step while the others train on.

    with Replica(model, optimizer, SparseArguments(balance=1e-2, controller=Sign(1e-2)), seed=0) as replica:
        for step in replica.train(Batches(dataset, size=4, micro_batches=8), steps=1000):
            print(step)

is the program of every replica; a lighthouse of torchft (`torchft_lighthouse --min_replicas 1`) tells them of each
other. The micro-batches of a step are divided among the replicas that live, so a step computes the same by however many
of them, up to rounding. A step counts only if every sum over replicas succeeded: gradients, loads and counts are summed
before torchft decides, and weights, optimizer, controllers and loss weights move after it, without communication.

torchft compares replicas by the number of their steps alone. Two parts of a training that took a step apart from each
other, as when a replica is taken for dead and was only slow, would go on together with unequal weights. Here every step
has a name, drawn by one replica, and a replica whose last step has another name than that of the first one heals.

Checked with torchft 0.2 on gloo, one process per replica.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moeify import ranks
from moeify.balance import Control, control
from moeify.integrations.replicas.batches import Batch, Batches
from moeify.integrations.replicas.sums import Buffers, sum_gradients
from moeify.layers import sparse_layers
from moeify.notices import notify
from moeify.routers import begin_step
from moeify.routers.lookup import split_router_inputs
from moeify.train import BalanceHook, SparseArguments, balance_hook
from moeify.train.checkpoint.state import balance_state, optimizer_state, set_balance_state
from moeify.train.finite import find_nonfinite

try:
    import torchft

    from moeify.integrations.replicas.healing import State, Transport, overwrite, set_optimizer
except ImportError as missing:
    raise ImportError("moeify.integrations.torchft needs torchft: pip install 'moeify[torchft]'") from missing

__all__ = ["Batches", "Replica", "Step"]

_KEY = "moeify"
_SOURCE = "the replica that is training"


@dataclass(frozen=True)
class Step:
    """What came of a step.

    Attributes:
        number: of the step, from 0.
        replicas: that computed it.
        committed: whether the weights moved; if not, the step is repeated by the replicas that are left.
        loss: mean over the micro-batches of all replicas; NaN in a step that did not count.
    """

    number: int
    replicas: int
    committed: bool
    loss: float


class Replica:
    """One of several replicas that train a model together by torchft.

    The state that a joining replica gets from another one: all parameters and buffers, the optimizer, the schedule,
    what controllers remember, the loads of the last step, the adaptive weights of losses, the seed and the number of
    the step. Random numbers and the position in the data are functions of these two. Nothing is pickled.

    Args:
        model: one that `sparsify` made, or an MoE of transformers, on the device of this replica; is put into training
            mode. All replicas must build the same one; its weights need not be equal.
        optimizer: of its parameters.
        sparse: how the experts are balanced.
        scheduler: of the learning rate; it moves after each step that counts.
        seed: of dropout and noise.
        max_grad_norm: to which gradients are clipped.
        loss: the mean loss of a micro-batch; the model's own by default.
        min_replicas: how many must live for a step to count.
        lighthouse: the address of torchft's lighthouse, that of the environment variable TORCHFT_LIGHTHOUSE by default.
        name: of the replica, for logs.
        hostname: under which the others reach this one.
        timeout: after how many seconds a step fails for a replica that lives and does not answer.
        patience: for how many seconds to wait for `min_replicas`, and for those that have not noticed a failure yet.
        group: torchft's process group, `ProcessGroupGloo` by default.

    Raises:
        ValueError: no lighthouse; several ranks in a replica; settings that cannot work with the model, as
            `moeify.train.balance_hook` and `moeify.balance.control` refuse them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparse: SparseArguments | None = None,
        *,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        min_replicas: int = 1,
        lighthouse: str | None = None,
        name: str = "",
        hostname: str | None = None,
        timeout: float = 60.0,
        patience: float = 600.0,
        group: Any = None,
    ) -> None:
        sparse = SparseArguments() if sparse is None else sparse
        _require(model, sparse, lighthouse)
        self.model, self.optimizer, self.scheduler = model.train(), optimizer, scheduler
        self.seed, self.max_grad_norm, self._loss = seed, max_grad_norm, loss or _own_loss
        self._device = next(model.parameters()).device
        self._targets = sparse.targets
        self._control: Control | None = None
        if sparse.controller is not None:
            self._control = control(model, optimizer, sparse.controller)
        self._hook: BalanceHook | None = balance_hook(model, sparse) if sparse.watches else None
        self._buffers = Buffers(model)
        self._last, self._next = 0, 0  # names of the last step that counted, and of this one
        host, wait = hostname or socket.gethostname(), timedelta(seconds=timeout)
        self._store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._group = group or torchft.ProcessGroupGloo(timeout=wait)
        self._manager = torchft.Manager(
            pg=self._group,
            load_state_dict=None,
            state_dict=None,
            min_replica_size=min_replicas,
            use_async_quorum=False,  # who lives must be known before tokens are counted, and healing precedes forward
            timeout=wait,
            quorum_timeout=timedelta(seconds=max(patience, timeout)),
            connect_timeout=wait,
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self._store.port,
            lighthouse_addr=lighthouse,
            replica_id=name or None,
            hostname=host,
            checkpoint_transport=Transport(host, _KEY, timeout),
        )
        self._manager.register_state_dict_fn(_KEY, self._heal, self.state)

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the other replicas, and the model without hooks."""
        self._manager.shutdown(wait=False)
        for attached in (self._hook, self._control):
            if attached is not None:
                attached.remove()

    @property
    def steps(self) -> int:
        """How many steps have counted, in which this replica need not have been there."""
        return self._manager.current_step()

    def train(self, batches: Callable[[int], Sequence[Batch]], steps: int) -> Iterator[Step]:
        """Train until so many steps have counted, and yield every step, those that did not count among them.

        Args:
            batches: the micro-batches of a step by its number, the same for every replica; such as `Batches`.
            steps: of the whole training.

        Raises:
            ValueError: a step has fewer micro-batches than there are replicas.
            FloatingPointError: a gradient is not finite; all replicas stop before the step.
        """
        while self.steps < steps:
            yield self.step(batches)

    def step(self, batches: Callable[[int], Sequence[Batch]]) -> Step:
        """Heal if needed, compute this replica's share of the micro-batches of the next step, and take it if all did.

        Args:
            batches: as of `train`.

        Raises:
            ValueError, FloatingPointError: as of `train`.
        """
        self._manager.start_quorum()
        number, replicas = self.steps, self._manager.num_participants()
        rank, of_step = self._manager.participating_rank() or 0, batches(number)
        mine = range(rank, len(of_step), max(replicas, 1))
        if replicas > len(of_step):
            raise ValueError(
                f"step {number} has {len(of_step)} micro-batches for {replicas} replicas; give every step at least as "
                "many micro-batches as there may be replicas"
            )
        self._buffers.keep()
        begin_step(self.model, number, seed=self.seed)
        self.optimizer.zero_grad()
        loss = float("nan")
        if self._name_step(number, rank, replicas):
            loss = self._compute(number, [(i, of_step[i]) for i in mine], len(of_step))
        committed = self._manager.should_commit()
        if committed:
            self._move()
        else:
            self._abandon(number, replicas)
        transformers.set_seed(_mix(self.seed, self.steps, -1))
        return Step(number, replicas, committed, loss if committed else float("nan"))

    def _name_step(self, number: int, rank: int, replicas: int) -> bool:
        """Draw the name of the step; whether all replicas come from the same step before, and so may take it."""
        names = torch.zeros(replicas + 1, dtype=torch.int64, device=self._device)
        names[rank] = self._last
        names[-1] = secrets.randbits(62) if rank == 0 else 0
        self._sum(names)
        if self._failed:
            return False
        *last, self._next = names.tolist()
        if len(set(last)) > 1:
            if self._last != last[0]:
                self._manager.load_state_dict({"step": 0, "batches_committed": 0})  # so that torchft heals this one
            self._manager.report_error(RuntimeError(f"replicas took step {number - 1} apart from each other"))
        return not self._failed

    def _compute(self, number: int, batches: list[tuple[int, Batch]], whole: int) -> float:
        """The gradients and loads of a step in every replica, and its loss."""
        batches = [(i, _on(batch, self._device)) for i, batch in batches]
        if self._hook is not None:
            self._hook.step = number
            with ranks.summed_beyond(self._sum):
                self._hook.begin([batch for _, batch in batches], self._device)
        total = torch.zeros((), device=self._device)
        for i, batch in batches:
            if self._failed:
                return float("nan")
            transformers.set_seed(_mix(self.seed, number, i))
            loss = self._loss(self.model, batch) / whole
            loss.backward()
            total += loss.detach().float()
        self._sum(total)
        sum_gradients(self.model, self._sum)
        with ranks.summed_beyond(self._sum):
            for attached in (self._hook, self._control):
                if attached is not None:
                    attached.gather()
        self._buffers.average(self._sum, self._manager.num_participants())
        if not self._failed:
            self._require_finite(number, [batch for _, batch in batches])
        return total.item()

    def _require_finite(self, number: int, batches: list[Batch]) -> None:
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        if norms and not torch.stack([norm.float() for norm in norms]).norm().isfinite():
            raise FloatingPointError(
                f"{find_nonfinite(self.model, batches)} is not finite in step {number + 1}; the optimizer has not "
                "touched the weights; lower the learning rate, clip gradients (max_grad_norm=1.0) or look at the batch"
            )

    def _move(self) -> None:
        """Take the step; everything was summed before, so that all replicas do the same."""
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()  # and then the controller moves the biases
        if self._hook is not None:
            self._hook.end()
        if self.scheduler is not None:
            self.scheduler.step()
        self._last = self._next

    def _abandon(self, number: int, replicas: int) -> None:
        """Be as if the step had not begun."""
        self._buffers.restore()
        for attached in (self._hook, self._control):
            if attached is not None:
                attached.forget()
        self._group.abort(errored=False)  # others may wait for this one, and would do so until the timeout
        reason = self._manager.errored()
        why = f": {reason.original_exception}" if reason is not None else f", {replicas} replicas are too few"
        notify(f"moeify: step {number} is repeated{why}")

    @property
    def _failed(self) -> bool:
        """Whether a sum over replicas failed, so that the step cannot count."""
        return self._manager.errored() is not None

    def _sum(self, tensor: Tensor) -> None:
        """Sum over the replicas in place; torchft notes a failure, and the step does not count."""
        self._manager.allreduce(tensor, reduce_op=torch.distributed.ReduceOp.SUM).wait()

    def state(self) -> State:
        """What a joining replica gets, and what must be equal in all of them: tensors by name, and numbers."""
        tensors = {f"model|{name}": value.detach().cpu().contiguous() for name, value in _values(self.model).items()}
        optimizer, groups = optimizer_state(self.optimizer, self.model)
        tensors |= {f"optimizer|{name}": value.cpu().contiguous() for name, value in optimizer.items()}
        balance = balance_state(self._control, self._targets)
        tensors |= {f"balance|{name}": value.cpu().contiguous() for name, value in balance.items()}
        if self._hook is not None:
            tensors |= {f"loads|{name}": value.cpu().contiguous() for name, value in self._hook.loads.items()}
        numbers: dict[str, Any] = {"groups": _plain(groups), "seed": self.seed, "last": self._last}
        if self.scheduler is not None:
            numbers["schedule"] = _plain(self.scheduler.state_dict())
        return State(dict(sorted(tensors.items())), numbers)

    def _heal(self, state: State) -> None:
        """Take over the state of another replica.

        Raises:
            ValueError: that replica has another model, optimizer or balancing.
        """
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("model", "optimizer", "balance", "loads")}
        for name, tensor in state.tensors.items():
            kind, _, rest = name.partition("|")
            parts[kind][rest] = tensor
        if ("schedule" in state.numbers) != (self.scheduler is not None):
            raise ValueError("only one of two replicas has a scheduler; start all of them with the same one, or none")
        overwrite(_values(self.model), parts["model"])
        set_optimizer(self.optimizer, self.model, parts["optimizer"], state.numbers["groups"])
        set_balance_state(self._control, self._targets, parts["balance"], _SOURCE)
        if self._hook is not None:
            self._hook.loads = {name: load.to(self._device) for name, load in parts["loads"].items()}
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state.numbers["schedule"])
        self.seed, self._last = state.numbers["seed"], state.numbers["last"]


def _require(model: nn.Module, sparse: SparseArguments, lighthouse: str | None) -> None:
    if lighthouse is None and "TORCHFT_LIGHTHOUSE" not in os.environ:
        raise ValueError(
            "replicas find each other by a lighthouse, and none was named; start one by "
            "`torchft_lighthouse --min_replicas 1`, and set TORCHFT_LIGHTHOUSE=http://HOST:29510 or pass lighthouse="
        )
    if ranks.count() > 1:
        raise ValueError(
            "a replica is one process here, and torch.distributed has several; start each without torchrun"
        )
    if sparse.dropout is not None:
        raise ValueError("expert dropout is scheduled by a trainer, which replicas have none of; leave dropout out")
    if sparse.watches and not sparse_layers(model):
        raise ValueError(
            f"{type(model).__name__} is dense, there is nothing to balance; make it sparse with moeify.sparsify, or "
            "pass SparseArguments(balance=0)"
        )


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    with split_router_inputs(model, batch) as inputs:
        return model(**inputs).loss


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those among them that a saved model leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _plain(values: Any) -> Any:
    """What JSON can hold: single-element tensors become numbers, tuples lists.

    Raises:
        TypeError: a value that it cannot hold.
    """
    if isinstance(values, Mapping):
        return {str(name): _plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    if isinstance(values, Tensor) and values.numel() == 1:
        return values.item()
    if values is None or isinstance(values, (str, int, float, bool)):
        return values
    raise TypeError(
        f"a {type(values).__name__} in the state of the optimizer or the schedule cannot be sent to another replica; "
        "it may hold tensors, numbers, strings and lists of them"
    )


def _mix(seed: int, step: int, micro_batch: int) -> int:
    """A seed that is a function of nothing else, so that a repeated micro-batch draws what it drew."""
    return (seed * 1_000_003 + step * 7_919 + micro_batch + 1) % 2**32
