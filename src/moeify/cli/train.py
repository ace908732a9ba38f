"""`moeify train`: make a model sparse, train it and its dense twin on the same text, and say what came of it."""

from __future__ import annotations

from pathlib import Path

from moeify.cli import options as o


def train(
    model: o.Model = None,
    data: o.Data = None,
    recipe: o.RecipeNameOrNone = None,
    experts: o.NumExperts = None,
    k: o.TopKExperts = None,
    output: o.Output = Path("runs/train"),
    steps: o.Steps = 400,
    batch: o.Batch = 16,
    accumulate: o.Accumulate = 1,
    length: o.Length = 128,
    learning_rate: o.LearningRate = 1.2e-3,
    weight_decay: o.WeightDecay = 0.1,
    balance: o.Balance = 0.002,
    scope: o.Scope = "global",
    z: o.Z = 0.0,
    controller: o.Controller = None,
    dropout: o.Dropout = None,
    seed: o.Seed = 0,
    seeds: o.Seeds = 1,
    evaluations: o.Evaluations = 10,
    width: o.Width = 128,
    layers: o.Layers = 4,
    heads: o.Heads = 4,
    hidden: o.Hidden = 512,
    device: o.Device = None,
    resume: o.Resume = False,
    progress: o.Progress = True,
) -> None:
    """Make a model sparse, and train it and its dense twin on the same text.

    Without arguments: a small byte-level Llama, sparse with 8 experts of which each token uses 2, learns the text that
    came with Python and torch. The run's folder then holds the sparse model, metrics.jsonl, summary.json, pictures and
    report.html. Ctrl-C saves; --resume goes on.
    """
    o.make_job(locals()).run()
