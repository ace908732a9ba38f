"""How papers fine-tune a trained sparse model: what they freeze, and which balancing losses they use."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from moeify.train.arguments import SparseArguments
from moeify.train.freeze import freeze, trainable


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A way to fine-tune.

    Attributes:
        frozen: the parts that are not trained, as `freeze` names them.
        sparse: the losses and the expert dropout.
        found: the result that its paper reports.
        source: the paper, with section or table.
    """

    frozen: tuple[str, ...] = ()
    sparse: SparseArguments = field(default_factory=SparseArguments)
    found: str
    source: str


fine_tunings: dict[str, FineTuning] = {
    "all": FineTuning(
        sparse=SparseArguments(balance=1e-2, z=1e-3),
        found="Everything learns. With a capacity of 0.75 to 1.25 the balance loss gains 0.8 to 0.9 points of "
        "SuperGLUE, with a capacity of 2 or more nothing.",
        source="ST-MoE, arXiv 2202.08906, table 5",
    ),
    "base": FineTuning(
        frozen=("router", "experts"),
        sparse=SparseArguments(balance=0.0),
        found="As good as training everything, for the memory and time of the dense part alone.",
        source="ST-MoE, arXiv 2202.08906, section 4.2",
    ),
    "attention": FineTuning(
        frozen=("router", "experts", "shared", "embeddings", "norms", "rest"),
        sparse=SparseArguments(balance=0.0),
        found="About as good as training everything.",
        source="ST-MoE, arXiv 2202.08906, figure 5",
    ),
    "dropout": FineTuning(
        sparse=SparseArguments(balance=1e-2, dropout=0.4),
        found="0.4 inside the experts and 0.1 elsewhere gain at most half a point; more than 0.1 elsewhere loses.",
        source="Switch, arXiv 2101.03961, table 4",
    ),
    "flan": FineTuning(
        frozen=("router",),
        sparse=SparseArguments(balance=0.0),
        found="For instruction tuning, slightly better than training everything; freezing experts is worse.",
        source="FLAN-MoE, arXiv 2305.14705, the ablation of fine-tuning strategies",
    ),
}
"""The named ways to fine-tune."""


def finetune(model: nn.Module, name: str, *, verbose: bool = True) -> SparseArguments:
    """Freeze what a named way to fine-tune freezes, and return the losses that go with it, for `SparseTrainer`.

        SparseTrainer(model, arguments, train_dataset=data, sparse=finetune(model, "base"))

    Parts that a model does not have, a router without parameters, need not be frozen.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.
        name: one of `fine_tunings`.
        verbose: print what is trained.

    Raises:
        ValueError: an unknown name; a model that has none of the parts to freeze, or nothing else.
    """
    if name not in fine_tunings:
        raise ValueError(f"no way to fine-tune is called {name!r}; choose from {', '.join(fine_tunings)}")
    way = fine_tunings[name]
    if way.frozen:
        has = trainable(model).parts
        present = [part for part in way.frozen if part in has]
        freeze(model, *(present or way.frozen), verbose=verbose)
    return way.sparse
