"""`sparsify`: dense model in, sparse model out, in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify.find.left import left_dense
from moeify.find.once import searching_once
from moeify.flops import count
from moeify.snapshot import restored_on_error
from moeify.sparsify.plan import find
from moeify.sparsify.recipe import Recipe
from moeify.sparsify.report import Report


def sparsify(
    model: nn.Module,
    recipe: Recipe,
    *,
    probe: Any = None,
    verify: bool = True,
    allow_noncausal: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Put sparse layers where a model has feed-forward networks; returns the same model.

    What is found is checked first: with a `DenseFFN` in the place of every feed-forward network, the model must
    compute what it computed. A call that raises, or is interrupted, leaves the model unchanged. Under a non-causal
    router, a model whose layers may or may not be a decoder raises as soon as one is called with a causal
    mask.

    Args:
        model: any module: of transformers, or plain PyTorch.
        recipe: how to make it sparse.
        probe: an input to compare outputs on (a tensor, a tuple of arguments or a mapping); by default one is guessed.
        verify: False converts without running the model. Nothing then shows that the sparse model computes what the
            dense one does, how tokens are laid out, or that padding is read.
        allow_noncausal: let decoders have routers that look at later tokens.
        verbose: print a table of what was done.

    Raises:
        ValueError: nothing to make sparse; a module that is not understood; no input to verify it with; copied experts
            with weights that do not sum to 1; a non-causal router in a decoder; and invalid settings of
            router, experts, shared and after.
    """

    def convert_and_show() -> nn.Module:
        report = convert(model, recipe, probe=probe, verify=verify, allow_noncausal=allow_noncausal)
        if verbose:
            report.show()
        return model

    return restored_on_error(model, convert_and_show, values=False)


def convert(
    model: nn.Module, recipe: Recipe, *, probe: Any = None, verify: bool = True, allow_noncausal: bool = False
) -> Report:
    """`sparsify`, without printing what was done."""
    if probe is not None and not verify:
        raise ValueError("verify=False makes no use of a probe; leave out one of the two")
    return restored_on_error(model, lambda: _convert(model, recipe, probe, verify, allow_noncausal))


def _convert(model: nn.Module, recipe: Recipe, probe: Any, verify: bool, allow_noncausal: bool) -> Report:
    dense_count = count(model)
    with searching_once():
        plan = find(model, recipe)
        left = left_dense(model, plan.sites)
    compare = plan.verify(probe) if verify else None
    plan.apply(allow_noncausal=allow_noncausal)
    difference = None if compare is None else compare.difference(model)
    if compare is not None and plan.keeps_function and not compare.same(model):
        raise ValueError(
            f"copied experts should leave the model's outputs as they are, but one changed by {difference:.3g}; "
            "please report this model"
        )
    return Report(plan.sites, plan.layers, dense_count, count(model), difference, left)
