"""What balances the demo's experts, and what it costs: a controller without a loss, against a weak loss.

The sparse model of `moeify train` (recipe `matched`, 400 steps) over three seeds that neither was tuned on. Reported
per run, on held-out text: loss, MaxVio of every layer, dead experts, and the mutual information of expert and domain.

    python claims/demo_balance.py       appends to claims/results/demo_balance.csv, about 6 minutes a seed on one core
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean, stdev

import torch
from results import append

from moeify.balance import Proportional
from moeify.data import ByteTokenizer, blocks
from moeify.data.corpus import build_corpus
from moeify.evaluate.run import Settings, train_run
from moeify.inspect import expert_load
from moeify.sparsify import recipes, sparsify
from moeify.tasks.base import Shape
from moeify.tasks.lm import small_llama
from moeify.train import SparseArguments

ARMS = {
    "proportional 0.03": SparseArguments(balance=0.0, controller=Proportional(0.03), progress=False),
    "loss 0.002": SparseArguments(balance=0.002, progress=False),
}
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    corpus = build_corpus()
    train, validation = blocks(corpus, ByteTokenizer(), LENGTH)
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm, sparse in ARMS.items():
            settings = Settings(
                steps=options.steps, learning_rate=1.2e-3, seed=seed, evaluations=1, sparse=sparse, device="cpu",
                extra={"save_strategy": "no"},
            )  # fmt: skip
            torch.manual_seed(seed)
            model = sparsify(small_llama(Shape(), LENGTH), recipes["matched"], verbose=False)
            with tempfile.TemporaryDirectory() as folder:
                run = train_run(arm, model, train, validation, Path(folder), settings)
            load = expert_load(model, validation)
            losses[arm].append(run.points[-1].loss)
            worst = load.max_violation.max().item()
            append("demo_balance", {
                "hardware": options.hardware, "threads": torch.get_num_threads(), "corpus": corpus.sha256[:12],
                "steps": options.steps, "arm": arm, "seed": seed, "validation_loss": f"{losses[arm][-1]:.4f}",
                "max_vio_by_layer": " ".join(f"{value:.3f}" for value in load.max_violation.tolist()),
                "dead_experts": int(load.dead.sum()), "expert_domain_bits": f"{load.information.mean().item():.4f}",
            })  # fmt: skip
            print(f"{arm}, seed {seed}: loss {losses[arm][-1]:.4f}, MaxVio of the worst layer {worst:.2f}", flush=True)
    pairs = [controlled - weak for controlled, weak in zip(*losses.values(), strict=True)]
    spread = f" ± {stdev(pairs):.4f}" if len(pairs) > 1 else ""
    print(f"controller - loss: {fmean(pairs):+.4f}{spread} over {len(pairs)} seeds")


if __name__ == "__main__":
    main()
