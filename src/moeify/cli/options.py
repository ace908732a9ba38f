"""Options that several commands share, with their help, and the functions that turn their values into objects."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeify.cli import config
from moeify.tasks import TASKS

if TYPE_CHECKING:
    from moeify.balance import Rule
    from moeify.schedule import Schedule
    from moeify.sparsify import Recipe
    from moeify.train.arguments import Loss

_RECIPE = "A named recipe (see `moeify recipes`) or a .json/.toml file"

_TASKS = "; ".join(f"{name}, {entry.line}" for name, entry in TASKS.items())

Task = Annotated[str, typer.Option(help=f"What is learned: {_TASKS}")]
TaskSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the task, NAME=VALUE; may be repeated", show_default="the task's own"),
]
Model = Annotated[
    str | None, typer.Option(help="A local or hub model to start from", show_default="a small one of the task")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Text, .jsonl, .csv, .parquet, a folder or a hub data set",
        show_default="data that need no download; for lm the text that came with Python and torch",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text for the model to read: a file, a folder or a hub data set",
        show_default="the text that came with Python and torch",
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", help=_RECIPE)]
RecipeNameOrNone = Annotated[
    str | None, typer.Option("--recipe", help=_RECIPE, show_default="matched; mixtral for a --model")
]
NumExperts = Annotated[
    int | None, typer.Option("--experts", min=1, help="Number of experts", show_default="the recipe's")
]
TopKExperts = Annotated[int | None, typer.Option("--k", min=1, help="Experts per token", show_default="the recipe's")]
Probe = Annotated[
    str | None,
    typer.Option(
        help="An input to verify with: FILE.safetensors with tensors by the names of the model's arguments, or "
        "FILE.py:FUNCTION, which is run and returns a tensor, a tuple or a dictionary",
        show_default="one is guessed",
    ),
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Run the model to show that it computes the same")]
Output = Annotated[Path, typer.Option(help="The run's folder")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of each model")]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Take fewer steps where a pair of runs would take longer on this machine, and say how many",
        show_default="as long as the steps take",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Samples per step (of lm: blocks of tokens)")]
Accumulate = Annotated[int, typer.Option(min=1, help="Micro-batches that each step's samples are cut into")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per sample")]
LearningRate = Annotated[
    float | None, typer.Option(min=0, help="Peak learning rate", show_default="0.0012; 1e-5 with --finetune")
]
FineTuneBy = Annotated[
    str | None,
    typer.Option(
        "--finetune",
        help="Fine-tune a model that is sparse already: all, base, attention, dropout, flan, esft or esft_lora",
        show_default="make the model sparse",
    ),
]
Threshold = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the relevance that the experts chosen by esft have")
]
Freeze = Annotated[
    list[str] | None,
    typer.Option(
        help="A part of the sparse model that does not learn: router, experts, shared, attention, embeddings, norms, "
        "rest, or base for the last four; may be repeated",
        show_default="none; base for low-rank experts of a --model",
    ),
]
WeightDecay = Annotated[float, typer.Option(min=0, help="Weight decay of AdamW")]
Balance = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Weight of the balance loss; 0 turns it off",
        show_default="0.01; 0 where a controller balances matched, and for soft, hash and peer",
    ),
]
Losses = Annotated[
    list[str] | None,
    typer.Option(
        "--loss",
        help="A further loss of the routing, NAME=WEIGHT, such as supervision=0.3; may be repeated",
        show_default="none",
    ),
]
Scope = Annotated[str, typer.Option(help="Scope of the balance loss: global, sequence or batch")]
Z = Annotated[float, typer.Option("--z", min=0, help="Weight of the router z-loss")]
Controller = Annotated[
    str | None,
    typer.Option(
        help='What moves selection biases: a name, or JSON such as {"name": "sign", "rate": 0.01}',
        show_default="none; without --balance, matched has proportional, rate 0.03",
    ),
]
Dropout = Annotated[float | None, typer.Option(min=0, max=1, help="Dropout inside the experts", show_default="none")]
Seed = Annotated[int, typer.Option(help="The first seed")]
Seeds = Annotated[int, typer.Option(min=1, help="Pairs of runs, each with its own seed")]
Evaluations = Annotated[int, typer.Option(min=1, help="How often the validation loss is measured after the start")]
Width = Annotated[int, typer.Option(min=8, help="Width of the small model")]
Layers = Annotated[int, typer.Option(min=1, help="Layers of the small model")]
Heads = Annotated[int, typer.Option(min=1, help="Attention heads of the small model")]
Hidden = Annotated[int, typer.Option(min=1, help="FFN width of the small model")]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Leave the weights on disk, for a model larger than memory; reads all data at once"),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda", show_default="the best there is")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a stopped run in the output folder")]
Config = Annotated[
    Path | None,
    typer.Argument(
        help="A .yaml, .toml or .json file of options by their names; those on the command line override it",
        callback=config.read,
        is_eager=True,
        show_default="none",
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the options as a file that repeats the run, and do nothing else")
]
Progress = Annotated[bool, typer.Option(help="Show the progress of training")]


def read_pairs(option: str, written: list[str] | None) -> dict[str, str]:
    """The values by name of an option that may be repeated.

    Raises:
        ValueError: one that is not NAME=VALUE.
    """
    pairs = [text.partition("=") for text in written or ()]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ValueError(f"{option} {name!r} is not NAME=VALUE")
    return {name: value for name, _, value in pairs}


def check_device(device: str | None) -> None:
    """Refuse a device that is unknown, or that torch does not find.

    Raises:
        ValueError: it is neither `cpu` nor `cuda`, or there is no GPU.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU; leave the option out, and the CPU is used")


def choose_losses(written: list[str] | None) -> list[tuple[float, Loss]]:
    """The losses of a decision that NAME=WEIGHT specify.

    Raises:
        ValueError: an unknown name, a loss of something else than one decision, or a weight that is no number.
    """
    from moeify import losses
    from moeify.registry import suggest

    of_decisions = {
        name: function
        for name in losses.__all__
        if callable(function := getattr(losses, name)) and _takes_a_decision(function)
    }
    found = []
    for name, weight in read_pairs("--loss", written).items():
        if name not in of_decisions:
            raise ValueError(f"no loss of a decision is named {name!r}; {suggest(name, list(of_decisions))}")
        try:
            found.append((float(weight), of_decisions[name]))
        except ValueError:
            raise ValueError(f"--loss {name}={weight}: the weight is no number") from None
    return found


def _takes_a_decision(function: Any) -> bool:
    """Whether a loss needs a routing decision and nothing else."""
    try:
        first, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return first.name == "routing" and all(other.default is not other.empty for other in others)


def choose_recipe(name: str, num_experts: int | None, k: int | None) -> Recipe:
    """The recipe that the options name, with the number of experts and k that they set.

    Raises:
        ValueError: an unknown recipe, or k for a router that has none.
    """
    from moeify.sparsify import read_recipe

    recipe = read_recipe(name)
    if num_experts is not None:
        recipe = replace(recipe, num_experts=num_experts)
    return recipe if k is None else replace(recipe, router=_with_k(recipe.router, k))


def _with_k(router: Any, k: int) -> Any:
    options = router.keywords if isinstance(router, partial) else {}
    maker = router.func if isinstance(router, partial) else router
    if "router" in options:
        return partial(maker, **options | {"router": _with_k(options["router"], k)})
    return partial(maker, **options | {"k": k})


def choose_freeze(recipe: Recipe, model: str | None, parts: list[str] | None) -> tuple[str, ...]:
    """The parts that do not learn: by default all but low-rank experts and their routers, where a model is given."""
    from moeify.sparsify import lora, lora_ffn

    if parts is not None:
        return tuple(parts)
    experts = recipe.experts.func if isinstance(recipe.experts, partial) else recipe.experts
    return ("base",) if model is not None and experts in (lora, lora_ffn) else ()


def choose_balance(recipe: str, balance: float | None, controller: str | None) -> tuple[float | Schedule, Rule | None]:
    """The weight of the balance loss and the controller.

    By default `matched` has a controller and no loss, and recipes whose routers keep no scores (`soft`, `hash`, `peer`)
    have neither.

    Raises:
        ValueError: a controller that is not known.
    """
    from moeify.balance import Proportional
    from moeify.sparsify import read_recipe
    from moeify.train import SparseArguments

    if recipe == "matched" and balance is None and controller is None:
        return 0.0, Proportional(rate=0.03)
    read = read_recipe(recipe)
    usual = SparseArguments().balance if read.router(8, read.num_experts).keeps_scores else 0.0
    return usual if balance is None else balance, choose_controller(controller)


def choose_controller(text: str | None) -> Rule | None:
    """The controller that a name or a JSON mapping specifies.

    Raises:
        ValueError: an unknown name or option, or broken JSON.
    """
    if text is None:
        return None
    from moeify.registry import decode

    try:
        return decode("controller", json.loads(text) if text.startswith("{") else text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--controller {text!r} is not valid JSON: {error}") from None


def choose_probe(text: str | None) -> Any:
    """The input that a file holds, or that a function of a Python file returns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one without this function.
    """
    if text is None:
        return None
    path, _, function = text.rpartition(":") if ".py:" in text else (text, "", "")
    if not function and Path(text).suffix != ".safetensors":
        raise ValueError(f"--probe {text!r} is neither FILE.safetensors nor FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} to read a probe from")
    if function:
        return _returned_by(Path(path), function)
    from moeify.files import read_tensors

    return read_tensors(Path(path))


def _returned_by(path: Path, function: str) -> Any:
    import runpy

    found = runpy.run_path(str(path)).get(function)
    if not callable(found):
        raise ValueError(f"{path} has no function {function!r} that returns a probe")
    return found()
