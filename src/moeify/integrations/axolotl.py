"""A plugin of Axolotl: makes the model sparse, balances its experts in every trainer, and draws their routing.

    plugins: [moeify.integrations.axolotl.Moeify]
    moe_recipe: matched          # a recipe's name or file; leave it out for a model that is sparse already
    moe_balance: 0.01            # or {balance: 0.01, z: 0.001, scope: sequence}
    moe_controller: {name: sign, rate: 0.001}     # for routers with a selection bias
    moe_report: true             # metrics.jsonl while it trains, inspect.html afterwards

Checked with Axolotl 0.19, whose package pins older versions of transformers than moeify supports: install it with
`pip install --no-deps axolotl`.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from moeify.inspect.report import report
from moeify.layers import sparse_layers
from moeify.notices import notify
from moeify.registry import decode
from moeify.sparsify import read_recipe, sparsify
from moeify.store import save
from moeify.train import BalanceCallback, RoutingCallback, SparseArguments
from moeify.train.run_log import LOG, entries

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, ConfigDict
except ImportError as missing:
    raise ImportError("moeify.integrations.axolotl needs Axolotl: pip install --no-deps axolotl") from missing

__all__ = ["Moeify", "MoeifyArgs"]

_BATCHES_OF_REPORT, _REPORT = 4, "inspect.html"


class MoeifyArgs(BaseModel):
    """The keys of moeify in the configuration of Axolotl, which checks their types."""

    model_config = ConfigDict(extra="ignore")

    moe_recipe: str | None = None
    moe_balance: float | dict[str, float | str] | None = None
    moe_controller: str | dict[str, Any] | None = None
    moe_report: bool = False


class Moeify(BasePlugin):
    """The plugin; name it under `plugins` as `moeify.integrations.axolotl.Moeify`.

    Raises:
        ValueError: while Axolotl loads the model, a recipe or controller that is not known, an adapter on a model that
            the same run makes sparse, or whatever `sparsify` refuses; when training begins, as of `BalanceCallback`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made_sparse = False
        self._trainer: Any = None

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys."""
        return f"{__name__}.{MoeifyArgs.__name__}"

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        """Make a dense model sparse, before Axolotl adds adapters."""
        if cfg.moe_recipe is None or sparse_layers(model):
            return
        if cfg.adapter:
            raise ValueError(
                f"adapter: {cfg.adapter} would be trained on routers that no file holds; make the model sparse first, "
                f"by moeify sparsify --recipe {cfg.moe_recipe}, and give that folder as base_model"
            )
        sparsify(model, read_recipe(cfg.moe_recipe))
        self._made_sparse = True

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Balance the experts unless `moe_balance: 0` is all there is, and log their load."""
        self._trainer = trainer
        sparse = arguments_of(cfg)
        balance = [BalanceCallback(sparse)] if sparse.watches else []
        return balance + ([RoutingCallback()] if cfg.moe_report else [])

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """Save a model that became sparse here as `moeify.load` reads it, and write the report.

        Axolotl calls it before and after it saves the model, by itself, into the same folder.
        """
        if not self._trainer.is_world_process_zero():
            return
        folder = Path(cfg.output_dir)
        if self._made_sparse:
            save(model, folder)
        if cfg.moe_report and not (folder / _REPORT).exists():
            _write_report(model, self._trainer, folder)


def _write_report(model: nn.Module, trainer: Any, folder: Path) -> None:
    """Show the routing of a few batches, held out where there are some, and of the training over time."""
    loader = trainer.get_train_dataloader() if trainer.eval_dataset is None else trainer.get_eval_dataloader()
    batches = [trainer._prepare_inputs(batch) for batch in islice(loader, _BATCHES_OF_REPORT)]
    report(
        model, batches, file=folder / _REPORT, title=folder.name, measure=False, log=list(entries(folder / LOG))
    )  # fmt: skip
    notify(f"moeify: {folder / _REPORT} shows what the experts do")


def arguments_of(cfg: Any) -> SparseArguments:
    """The balancing losses and the controller that the keys of moeify describe.

    Raises:
        ValueError: an unknown controller, or a weight or scope that `SparseArguments` refuses.
        TypeError: a key of `moe_balance` that is none of its arguments.
    """
    controller = None if cfg.moe_controller is None else decode("controller", cfg.moe_controller)
    weights = cfg.moe_balance
    if weights is None:
        return SparseArguments(controller=controller)
    return SparseArguments(**(weights if isinstance(weights, dict) else {"balance": weights}), controller=controller)
