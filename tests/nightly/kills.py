"""Kill a training at random moments, go on, and compare it bit for bit with one that was never killed.

    python tests/nightly/kills.py --kills 500

Runs are forked off this process, which has imported everything and runs no kernel itself. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import TrainingArguments

from moeify.sparsify import Recipe, sparsify
from moeify.train import SparseTrainer
from moeify.train.checkpoint.folder import checkpoints
from tiny_models import VOCABULARY, causal_lm

STEPS = 6
MOST = 8  # kills of one run, so that those of a finished one, which only starts, are few
KEPT = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json", "sparse.safetensors")


def train(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)
    ids = torch.randint(3, VOCABULARY, (64, 8))
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=1,
        save_total_limit=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=seed,
    )  # fmt: skip
    run = SparseTrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    run.train(resume_from_checkpoint=bool(checkpoints(folder)) or None)


def fork(folder: Path, seed: int) -> int:
    """Start a run, whose output goes to a file beside its folder."""
    if child := os.fork():
        return child
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        torch.set_num_threads(1)
        train(folder, seed)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(code)


def killed(folder: Path, seed: int, after: float) -> bool:
    """Start a run, and kill it after some seconds if it has not ended; whether it was."""
    child = fork(folder, seed)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a run ended with status {status}:\n{Path(f'{folder}.log').read_text()[-4000:]}")
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def outcome(folder: Path) -> list:
    """The bits of every step, and the last checkpoint."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss_hex"], row["grad_norm_hex"]) for row in rows if "loss_hex" in row]
    return [steps, *((folder / f"checkpoint-{STEPS}" / name).read_bytes() for name in KEPT)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=500)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    draw = random.Random(chosen.seed)
    began, kills, runs = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as root:
        while kills < chosen.kills:
            seed, whole, broken = chosen.seed + runs, Path(root, f"whole-{runs}"), Path(root, f"broken-{runs}")
            start = time.monotonic()
            killed(whole, seed, 600)
            seconds = time.monotonic() - start
            for _ in range(min(MOST, chosen.kills - kills)):
                if not killed(broken, seed, draw.uniform(0.1, 1.0) * seconds):
                    break
                kills += 1
            killed(broken, seed, 600)  # to the end, if it is not there; else it takes no more steps
            if outcome(broken) != outcome(whole):
                kept = shutil.copytree(root, tempfile.mkdtemp(prefix="kills-"), dirs_exist_ok=True)
                raise SystemExit(f"run {seed} differs after {kills} kills in all; both are in {kept}")
            runs += 1
            print(f"{kills} of {chosen.kills} kills, {runs} runs equal, {time.monotonic() - began:.0f} s", flush=True)
    facts = {"kills": kills, "runs": runs, "seconds": round(time.monotonic() - began), "torch": torch.__version__}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
