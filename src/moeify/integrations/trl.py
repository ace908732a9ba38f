"""TRL's SFT, DPO and GRPO trainers for sparse models, with everything that `SparseTrainer` adds to transformers'.

    trainer = SparseSFTTrainer(model, SFTConfig(...), train_dataset=data, sparse=SparseArguments(balance=1e-2))

Checked with TRL 1.16: the gradient of the balance loss is the same for any number of micro-batches, packed, padded or
padding-free. TRL's own, `router_aux_loss_coef`, is turned off; docs/guide/trainers.md says how it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moeify.train import SparseTrainerMixin

try:
    import trl
except ImportError as missing:
    raise ImportError("moeify.integrations.trl needs TRL: pip install 'moeify[trl]'") from missing

__all__ = ["SparseDPOTrainer", "SparseGRPOTrainer", "SparseSFTTrainer"]

_OF_THE_LOSS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class SparseSFTTrainer(SparseTrainerMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` for sparse models; takes `sparse` as `SparseTrainerMixin` does."""


class SparseDPOTrainer(SparseTrainerMixin, trl.DPOTrainer):
    """`trl.DPOTrainer` for sparse models: the policy is balanced, on chosen and rejected tokens."""

    def model_inputs(self, inputs: Any) -> Any:
        """Chosen and rejected sequences, without what only the loss reads."""
        return {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS}


class SparseGRPOTrainer(SparseTrainerMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` for sparse models: prompts and completions are balanced, as the policy is trained on them.

    Generation, old and reference policies run without gradients and do not count.

    Raises:
        ValueError: `steps_per_generation` is no multiple of `gradient_accumulation_steps`, so a step would begin before
            all its completions are there, and their number is needed for the balance loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._uncounted = 0
        generated, accumulated = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if generated % accumulated:
            raise ValueError(
                f"steps_per_generation={generated} is no multiple of gradient_accumulation_steps={accumulated}: an "
                "optimizer step would begin before all its completions are generated, and the balance loss needs "
                f"their number; pass steps_per_generation={accumulated * -(-generated // accumulated)}"
            )

    def begin_step(self, batches: list[Any]) -> None:
        """Count the completions of a step; its prompts come first, and are not yet what the model reads."""
        if all(isinstance(batch, Mapping) for batch in batches):
            super().begin_step(batches)
        else:
            self._uncounted = len(batches)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The micro-batch of completions; those of the whole step are counted before its first one is computed."""
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._uncounted:
            first = self._step % self.args.steps_per_generation
            self.begin_step(self._buffered_inputs[first : first + self._uncounted])
            self._uncounted = 0
        return inputs

    def model_inputs(self, inputs: Any) -> Any:
        """Prompts and completions in one sequence each."""
        parts = {"input_ids": ("prompt_ids", "completion_ids"), "attention_mask": ("prompt_mask", "completion_mask")}
        return {name: torch.cat([inputs[part] for part in pair], dim=1) for name, pair in parts.items()}
