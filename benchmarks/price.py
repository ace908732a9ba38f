"""What a training step of a sparse model costs beside its dense twin, and where the CPU time goes.

`moeify train` makes two models of equal active FLOPs; both train on the same tokens by its trainer, in turn, each as
the small model of the command and as one of 52 M parameters. A step is all that the trainer does from one step to the
next. Times are CPU times of this process on one thread: what else runs on the machine does not count, but it shares
caches and memory. First whole steps are timed, with nothing attached. Then steps are taken apart: functions and modules
are wrapped by a stopwatch that charges each moment to the innermost part that runs, and hooks on gradients divide the
backward pass likewise. Such a step is slower, and its parts are scaled to whole steps.

    python benchmarks/price.py
    python benchmarks/price.py --models demo --rounds 2 --steps 6 --out /tmp/price.csv
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import HEAD, in_turn, parser, points, ratios, report, start, summary
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from moeify import MoE, sparsify
from moeify.balance.control import Control
from moeify.cli.train import Train
from moeify.evaluate.objective import NextToken
from moeify.evaluate.run import make_trainer
from moeify.kernels.cpu import activation, layer
from moeify.kernels.stacked import Glu
from moeify.routers import base
from moeify.train import trainer
from moeify.train.checkpoint.saving import bare
from moeify.train.loss import StepLoss
from moeify.train.metrics import Tally

SHAPES = {
    "demo": {"width": 128, "hidden": 512, "heads": 4, "vocabulary": 259, "sequences": 16, "length": 128},
    "52M": {"width": 512, "hidden": 1792, "heads": 8, "vocabulary": 8192, "sequences": 8, "length": 256},
}
LAYERS = 4
WARM = 2  # steps before those that are counted
PARTS = (
    "router", "sort", "gather", "products", "activation", "scatter", "layer", "losses", "metrics", "finiteness",
    "controller", "optimizer", "model", "trainer",
)  # fmt: skip
"""`layer` is what a sparse layer does beside, `model` all other modules, `trainer` what is left of a step; the
feed-forward network of the dense twin is products and activation."""
FIELDS = [*HEAD, "model", "tokens", "part", "sparse_ms", "sparse_quartiles_ms", "dense_ms", "dense_quartiles_ms",
          "sparse_over_dense", "over_quartiles"]  # fmt: skip


class Tokens(torch.utils.data.Dataset):
    """Random tokens; every sample another, so that experts get other rows in every step."""

    def __init__(self, samples: int, length: int, vocabulary: int) -> None:
        self.length = length
        self.ids = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Steps(TrainerCallback):
    """The CPU seconds of every step, from its beginning to that of the next."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began.append(time.process_time())


class Stopwatch:
    """CPU seconds by part; each moment belongs to the part that was entered last and not left."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.inside, self.since = ["trainer"], time.process_time()

    def charge(self) -> None:
        now = time.process_time()
        self.spent[self.inside[-1]] += now - self.since
        self.since = now

    def enter(self, part: str, *_: Any) -> None:
        self.charge()
        self.inside.append(part)

    def leave(self, part: str, *_: Any) -> None:
        """Leave a part and those inside it; one that was not entered is ignored."""
        self.charge()
        if part in self.inside[1:]:
            while self.inside.pop() != part:
                pass

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(part)

        return timed


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """An attribute of a module or class is another one inside."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def through(watch: Stopwatch, part: str, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A block of the model, timed as a part forwards and backwards."""
    x = x.view_as(x)  # others read x too, and its gradient is complete only when theirs are
    x.register_hook(partial(watch.leave, part))
    y = watch.wrapped(part, compute)(x)
    y.register_hook(partial(watch.enter, part))
    return y


def network(watch: Stopwatch, self: nn.Module, x: Tensor) -> Tensor:
    """The feed-forward network of a Llama, its activation timed too."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    watch.enter("activation")
    activated = self.act_fn(gate)
    hidden = activated * up
    watch.leave("activation")
    for tensor, hook in ((hidden, watch.enter), (up, watch.leave), (activated, watch.enter), (gate, watch.leave)):
        tensor.register_hook(partial(hook, "activation"))
    return self.down_proj(hidden)


@contextmanager
def taken_apart(watch: Stopwatch, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The functions and modules that make a step are timed."""
    moe_forward = MoE.forward

    def route(self: nn.Module, *args: Any, forward: Callable[..., Any]) -> Any:
        routing = watch.wrapped("router", forward)(self, *args)
        routing.weight.register_hook(partial(watch.enter, "router"))
        return routing

    def own(kind: type[nn.Module]) -> Callable[..., Any]:
        return lambda self, *args, forward=kind.forward: route(self, *args, forward=forward)

    functions = [
        ("sort", base, "assign"), ("products", layer, "multiply_rows"), ("products", layer, "multiply_rows_tn"),
        ("gather", Tensor, "index_select"), ("scatter", Tensor, "index_add_"), ("activation", Glu, "__call__"),
        ("activation", torch.autograd, "grad"), ("activation", activation, "activate"),
        ("activation", activation, "differentiate"), ("losses", StepLoss, "begin"), ("losses", StepLoss, "add"),
        ("losses", StepLoss, "weighted"), ("losses", StepLoss, "end"), ("metrics", Tally, "add"),
        ("metrics", Tally, "end_step"), ("finiteness", MoE, "_require_finite"), ("finiteness", trainer, "is_finite"),
        ("controller", Control, "observe"), ("controller", Control, "step"), ("model", Tensor, "backward"),
        ("model", type(model), "forward"),
    ]  # fmt: skip
    routers = {type(module.router) for module in model.modules() if isinstance(module, MoE)}
    networks = {type(module) for module in model.modules() if hasattr(module, "gate_proj")}
    with ExitStack() as stack:
        for part, owner, name in functions:
            stack.enter_context(replaced(owner, name, watch.wrapped(part, getattr(owner, name))))
        for kind in routers:
            stack.enter_context(replaced(kind, "forward", own(kind)))
        moe = lambda self, x: through(watch, "layer", partial(moe_forward, self), x)  # noqa: E731
        stack.enter_context(replaced(MoE, "forward", moe))
        for kind in networks:
            ffn = lambda self, x: through(watch, "products", partial(network, watch, self), x)  # noqa: E731
            stack.enter_context(replaced(kind, "forward", ffn))
        for handle in (
            optimizer.register_step_pre_hook(partial(watch.enter, "optimizer")),
            optimizer.register_step_post_hook(partial(watch.leave, "optimizer")),
        ):
            stack.callback(handle.remove)
        yield


class Arm:
    """One of the two models with its trainer."""

    def __init__(self, model: nn.Module, shape: dict[str, int], steps: int) -> None:
        self.model, self.count = model, steps
        self.steps, self.laps = Steps(), Laps()
        job = Train().job()
        settings = replace(
            job.settings, steps=steps + WARM + 1, batch=shape["sequences"], device="cpu",
            sparse=replace(job.settings.sparse, progress=False), extra={"save_strategy": "no", "logging_steps": 10},
        )  # fmt: skip
        samples = Tokens(settings.steps * settings.batch, shape["length"], shape["vocabulary"])
        folder = Path(tempfile.mkdtemp(prefix="moeify-price-"))
        self.trainer = make_trainer(model, samples, folder, settings, [self.steps, self.laps], NextToken())

    def whole(self, turn: int) -> float:
        """Milliseconds of a step."""
        self.steps.began.clear()
        with redirect_stdout(io.StringIO()):
            self.trainer.train()
        steps = [1000 * (after - before) for before, after in pairwise(self.steps.began)]
        return median(steps[WARM:])

    def parts(self, turn: int) -> dict[str, float]:
        """Milliseconds of the parts of a step that is taken apart."""
        watch = self.laps.watch = Stopwatch()
        with taken_apart(watch, self.model, bare(self.trainer.optimizer)):
            self.whole(turn)
        self.laps.watch = None
        return {part: 1000 * seconds / self.count for part, seconds in self.laps.spent.items()}


class Laps(TrainerCallback):
    """What a stopwatch has charged between two steps."""

    def __init__(self) -> None:
        self.watch: Stopwatch | None = None
        self.begun = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.charge()
            if self.begun == WARM:
                self.watch.spent.clear()
            self.spent = dict(self.watch.spent)
            self.begun += 1


def arms(shape: dict[str, int], steps: int) -> dict[str, Arm]:
    """The sparse model of `moeify train` and its dense twin, of one shape."""
    config = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["width"], intermediate_size=shape["hidden"],
        num_hidden_layers=LAYERS, num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"],
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dense, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    sparse = sparsify(other, Train().job().recipe, verbose=False)
    return {name: Arm(model, shape, steps) for name, model in (("sparse", sparse), ("dense", dense))}


def rows_of(whole: dict[str, list[float]], parts: dict[str, list[dict[str, float]]]) -> list[dict[str, str]]:
    """A row of whole steps and one of every part, scaled so that the medians of all parts add up to a whole step.

    Args:
        whole: milliseconds of a step in every round.
        parts: milliseconds of every part in every round, of steps that were taken apart.
    """
    step = {"part": "step"} | summary(("sparse_over_dense", "over_quartiles"), ratios(*whole.values()), ".3f")
    rows = [step]
    for name, values in whole.items():
        step |= summary((f"{name}_ms", f"{name}_quartiles_ms"), values)
    for part in PARTS:
        row = {"part": part}
        for name, values in whole.items():
            shares = [lap.get(part, 0.0) / sum(lap.values()) for lap in parts[name]]
            row |= summary((f"{name}_ms", f"{name}_quartiles_ms"), [share * median(values) for share in shares], ".3g")
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__, rounds=5, file="price-cpu.csv")
    options.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options.add_argument("--steps", type=int, default=6, help="steps that are timed together")
    chosen = options.parse_args()
    begin = start(chosen)
    for what in points(chosen, begin, [{"model": name} for name in chosen.models]):
        name = what["model"]
        both = arms(SHAPES[name], chosen.steps)
        whole = in_turn({arm: both[arm].whole for arm in both}, chosen.rounds)
        apart = in_turn({arm: both[arm].parts for arm in both}, min(3, chosen.rounds))
        tokens = SHAPES[name]["sequences"] * SHAPES[name]["length"]
        rows = rows_of(whole, apart)
        report(chosen.out, FIELDS, [begin | what | {"tokens": str(tokens)} | row for row in rows])


if __name__ == "__main__":
    main()
