"""`Columns`: a trainer mixin that passes columns of a dataset to the routers that look them up."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from moeify.routers.lookup import columns, split_router_inputs

_Trainer: Any = object  # at run time the mixin is combined with a trainer of transformers


class Columns(_Trainer):
    """Keeps the columns that routers look up, and gives them to the routers in the place of the model's forward."""

    def _set_signature_columns_if_needed(self) -> None:
        """Keep these columns wherever the trainer removes unused ones."""
        super()._set_signature_columns_if_needed()
        known = self._signature_columns
        self._signature_columns = known + sorted(columns(self.model) - set(known))

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Forward and backward, which may repeat the forward, with the columns that routers look up."""
        with self._without_columns(inputs) as rest:
            return super().training_step(model, rest, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Forward, or generation, with the columns that routers look up."""
        with self._without_columns(inputs) as rest:
            return super().prediction_step(model, rest, *args, **kwargs)

    def _without_columns(self, inputs: Any) -> AbstractContextManager[Any]:
        """The other columns of a batch; a list of prompts, from which a trainer of TRL generates, has none to pass."""
        return split_router_inputs(self.model, inputs) if isinstance(inputs, Mapping) else nullcontext(inputs)
