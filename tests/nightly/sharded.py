"""Kill ranks of a sharded training, let torchrun start them anew, and count how many runs end cleanly.

    python tests/nightly/sharded.py --kills 50 --restarts 9 --exits 100

Two ranks train a sparse model with whole experts on each (FSDP2, ep 2), and save a checkpoint in every step, in half of
the runs in the background.

kills: one rank or both get SIGKILL at a random moment, and the run is started again; it must end bit for bit as one
    that was never killed, and the rank that lives must end by itself.
restarts: the same, one rank killed under torchrun --standalone --max-restarts 3, which starts both again.
exits: a run of three steps must end with exit code 0, interpreter included.

Ranks are forked off this process, which has imported everything and runs no kernel itself, but for restarts. Prints one
line of JSON. With `--counts FILE` counts are kept after every run, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (ranks that are forked need not read it)
from transformers import TrainerCallback, TrainingArguments

from moeify import Recipe, sparsify
from moeify.files import read_json, read_tensors
from moeify.parallel import distribute
from moeify.train import SparseArguments, SparseTrainer
from moeify.train.checkpoint.folder import checkpoints
from tiny_models import VOCABULARY, causal_lm

RANKS, STEPS = 2, 6
MOST = 8  # kills of one run, so that those of a finished one, which only starts, are few


class Die(TrainerCallback):
    """Kills the process at some step of its first attempt."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if (
            state.global_step == self.step
            and args.process_index == 1
            and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        ):
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, seed: int, steps: int = STEPS, die: int = 0) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=1,
        save_total_limit=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=seed, ddp_timeout=60,
    )  # fmt: skip
    model = distribute(
        sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False), {"fsdp_size": 2, "ep_size": 2}
    )
    ids = torch.randint(3, VOCABULARY, (64, 8), generator=torch.Generator().manual_seed(seed))
    run = SparseTrainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        sparse=SparseArguments(background_save=bool(seed % 2)), callbacks=[Die(die)] if die else [],
    )  # fmt: skip
    run.train(resume_from_checkpoint=bool(checkpoints(folder)) or None)
    torch.distributed.destroy_process_group()


def fork(folder: Path, seed: int, steps: int = STEPS) -> list[int]:
    """Start all ranks of a run, whose output goes to a file beside its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RANKS):
        if child := os.fork():
            children.append(child)
            continue
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": RANKS, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in where.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
        try:
            train(folder, seed, steps)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        raise SystemExit(0)  # the end of the interpreter is part of the run
    return children


def ended(children: list[int], seconds: float) -> dict[int, int]:
    """The exit statuses of the processes that end within some seconds."""
    found, end = {}, time.monotonic() + seconds
    while len(found) < len(children) and time.monotonic() < end:
        for child in [child for child in children if child not in found]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = status
        time.sleep(0.002)
    return found


def finish(folder: Path, seed: int) -> None:
    """Run to the end."""
    children = fork(folder, seed)
    statuses = ended(children, 900)
    if list(statuses.values()) != [0] * RANKS:
        stop(folder, f"ranks ended with {statuses}", children)


def stop(folder: Path, why: str, children: list[int]) -> None:
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    raise SystemExit(f"{folder}: {why}\n{Path(f'{folder}.log').read_text()[-6000:]}")


def killed(folder: Path, seed: int, after: float, who: list[int], wait: float) -> bool:
    """Start a run, kill some ranks after some seconds, and wait for the others; False if it had ended before."""
    children = fork(folder, seed)
    statuses = ended(children, after)
    if any(statuses.values()):
        stop(folder, f"ranks ended with {statuses}", children)
    if len(statuses) == RANKS:
        return False
    for rank in who:
        if children[rank] not in statuses:
            os.kill(children[rank], signal.SIGKILL)
    rest = ended([child for child in children if child not in statuses], wait)
    if len(statuses) + len(rest) < RANKS:
        stop(folder, f"a rank was still there {wait} seconds after the other one was killed", children)
    return True


def outcome(folder: Path) -> list:
    """The bits of every step, and the last checkpoint."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss_hex"], row["grad_norm_hex"]) for row in rows if "loss_hex" in row]
    last = folder / f"checkpoint-{STEPS}"
    tensors = sorted(  # either rank may hold what both have, such as the number of steps
        (path.parent.name, name, str(tensor.dtype), tensor.shape, tensor.numpy().tobytes())
        for path in last.rglob("*.safetensors")
        for name, tensor in read_tensors(path).items()
    )
    assert len(tensors) > 100
    return [steps, tensors, read_json(last / "optimizer.json")]


def compare(whole: Path, broken: Path, root: str) -> None:
    if outcome(broken) != outcome(whole) or list(broken.glob("*.tmp")):
        kept = shutil.copytree(root, tempfile.mkdtemp(prefix="sharded-"), dirs_exist_ok=True)
        raise SystemExit(f"{broken.name} differs from {whole.name}; both are in {kept}")


class Counts(Counter[str]):
    """What was counted, kept in a file if there is one."""

    def __init__(self, file: Path | None):
        super().__init__(json.loads(file.read_text()) if file is not None and file.exists() else {})
        self.file = file

    def keep(self, **more: int) -> None:
        self.update(more)
        if self.file is not None:
            self.file.write_text(json.dumps(self))
        print(json.dumps(self), flush=True)


def kill_runs(kills: int, counts: Counts, root: str, wait: float) -> None:
    while counts["kills"] < kills:
        runs, left = counts["runs"], kills - counts["kills"]
        draw, hit = random.Random(runs), Counter[str]()
        whole, broken = Path(root, f"whole-{runs}"), Path(root, f"broken-{runs}")
        start = time.monotonic()
        finish(whole, runs)
        seconds = time.monotonic() - start
        for _ in range(min(MOST, left)):
            who = draw.choice([[0], [1], [0, 1]])
            if not killed(broken, runs, draw.uniform(0.1, 1.0) * seconds, who, wait):
                break
            hit["both" if len(who) > 1 else "one"] += 1
        finish(broken, runs)
        compare(whole, broken, root)
        counts.keep(kills=hit.total(), kills_of_one_rank=hit["one"], runs=1)


def restart_runs(restarts: int, counts: Counts, root: str) -> None:
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for number in range(counts["restarts"], restarts):
        whole, broken = Path(root, f"calm-{number}"), Path(root, f"struck-{number}")
        die = random.Random(number).randrange(1, STEPS)
        finish(whole, number)
        command = [
            "-m", "torch.distributed.run", "--standalone", "--max-restarts=3", f"--nproc-per-node={RANKS}", __file__,
            "--worker", str(broken), "--seed", str(number), "--die", str(die),
        ]  # fmt: skip
        result = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900
        )
        if result.returncode:
            raise SystemExit(f"torchrun ended with {result.returncode}:\n{(result.stdout + result.stderr)[-6000:]}")
        compare(whole, broken, root)
        counts.keep(restarts=1, attempts_beside_the_first=(broken / "attempts").read_text().count("1\n"))


def exit_runs(exits: int, counts: Counts, root: str) -> None:
    for number in range(counts["exits"], exits):
        children = fork(Path(root, f"exit-{number}"), number, steps=3)
        statuses = ended(children, 900)
        is_clean = list(statuses.values()) == [0] * RANKS
        if not is_clean:
            print(f"run {number} ended with {statuses}", flush=True)
        counts.keep(exits=1, clean_exits=int(is_clean))
        shutil.rmtree(Path(root, f"exit-{number}"), ignore_errors=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--restarts", type=int, default=9)
    options.add_argument("--exits", type=int, default=100)
    options.add_argument("--counts", type=Path, help="a JSON file in which counts are kept")
    options.add_argument("--wait", type=float, default=120, help="seconds for a rank to notice that another is gone")
    options.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--die", type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker is not None:
        chosen.worker.mkdir(exist_ok=True)
        if os.environ["RANK"] == "0":
            with (chosen.worker / "attempts").open("a") as attempts:
                attempts.write(os.environ["TORCHELASTIC_RESTART_COUNT"] + "\n")
        return train(chosen.worker, chosen.seed, die=chosen.die)
    counts, began = Counts(chosen.counts), time.monotonic()
    root = tempfile.mkdtemp()  # no context: ranks leave through this function too
    kill_runs(chosen.kills, counts, root, chosen.wait)
    restart_runs(chosen.restarts, counts, root)
    exit_runs(chosen.exits, counts, root)
    shutil.rmtree(root)
    failed = counts["clean_exits"] < counts["exits"]
    print(json.dumps(dict(counts) | {"seconds": round(time.monotonic() - began), "torch": torch.__version__}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
