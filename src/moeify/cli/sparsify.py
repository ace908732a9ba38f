"""`moeify sparsify`: make a model sparse and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeify.cli import options as o


def sparsify(
    model: Annotated[str, typer.Argument(help="A local or hub model of transformers")],
    output: Annotated[Path, typer.Argument(help="The folder to write")],
    recipe: o.RecipeName = "mixtral",
    experts: o.NumExperts = None,
    k: o.TopKExperts = None,
    architecture: Annotated[
        str, typer.Option(help="How to load it: AutoModelForCausalLM, AutoModel, or another class of transformers")
    ] = "AutoModelForCausalLM",
    probe: o.Probe = None,
    verify: o.Verify = True,
) -> None:
    """Make a dense model sparse and save it with its tokenizer; `moeify generate` and `moeify.load` read it."""
    from moeify.sparsify import sparsify as make_sparse
    from moeify.store import save
    from moeify.tasks.models import load_dense, load_tokenizer, save_tokenizer

    chosen, given = o.choose_recipe(recipe, experts, k), o.choose_probe(probe)
    save(make_sparse(load_dense(model, architecture), chosen, probe=given, verify=verify), output)
    if not verify:
        print("moeify: not verified: nothing shows that the sparse model computes what the dense one does")
    try:
        save_tokenizer(load_tokenizer(model), output)
    except ValueError:
        print("moeify: the model has no tokenizer, so none was saved")
    print(f"moeify: saved in {output}")
