"""Kill replicas of a training under torchft at random moments, start them again, and compare all replicas bit for bit.

    python tests/nightly/replicas.py --kills 20

Three replicas of a tiny MoE train together, each of them a process: sparsified and native models, each with another
controller. One of them gets SIGKILL at a random moment of a step; once the others have gone on it starts again with
other weights. Held are: no survivor loses more than one step for a kill; whenever replicas have taken the same step,
the SHA-256 of experts, biases, other weights, optimizer, controllers, loads and random numbers are equal; and the
losses of all steps are within 1 % of those of one replica that is never killed, so that no micro-batch is lost or
repeated. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from replicas import CASES, Training

NAMES = ("replica0", "replica1", "replica2")


def one_kill(run: Training, draw: random.Random) -> dict:
    """Kill one replica and start it again; what it cost."""
    victim = draw.choice(NAMES)
    survivors = [name for name in NAMES if name != victim]
    before = run.committed(survivors[0])[-6:]
    step = (before[-1]["time"] - before[0]["time"]) / (len(before) - 1)
    time.sleep(draw.uniform(0, 3) * step)
    marks = {name: len(run.rows(name)) for name in survivors}
    killed = time.monotonic()
    run.kill(victim)
    run.wait_for(survivors, 3)
    after = {name: run.rows(name)[marks[name] :] for name in survivors}
    lost = max(sum(not row["committed"] for row in rows) for rows in after.values())
    paused = max(next(r["time"] for r in rows if r["committed"] and r["replicas"] == 2) for rows in after.values())
    run.start(victim)
    started = time.monotonic()
    run.wait_for(NAMES, 3)
    healed = run.committed(victim)[0]["time"]
    if odd := run.different():
        raise SystemExit(f"after the kill of {victim} replicas differ: {odd[:5]} in {run.folder}")
    return {"lost": lost, "pause": paused - killed, "heal": healed - started}


def losses(run: Training) -> dict[int, float]:
    """Of every step that counted, by any replica."""
    return {row["number"]: row["loss"] for name in NAMES for row in run.rows(name) if row["committed"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    draw, began, kills, largest = random.Random(chosen.seed), time.monotonic(), [], 0.0
    root = Path(tempfile.mkdtemp(prefix="replicas-"))
    for i, case in enumerate(CASES):
        share = chosen.kills // len(CASES) + (i < chosen.kills % len(CASES))
        with Training(root / case, case, 3) as run:
            run.wait_for(NAMES, 6)
            for _ in range(share):
                kills.append(one_kill(run, draw))
                print(f"{case}: {len(kills)} of {chosen.kills} kills, {kills[-1]}", flush=True)
            broken = losses(run)
        with Training(root / f"{case}-whole", case, 1, steps=len(broken)) as run:
            run.wait(lambda run=run: len(run.rows("replica0")) == run.steps)
            whole = losses(run)
        largest = max(largest, max(abs(broken[n] - whole[n]) / whole[n] for n in whole))
    facts = {
        "kills": len(kills), "most steps lost": max(kill["lost"] for kill in kills),
        "kills that cost a step": sum(kill["lost"] > 0 for kill in kills),
        "longest pause": round(max(kill["pause"] for kill in kills), 2),
        "median pause": round(sorted(kill["pause"] for kill in kills)[len(kills) // 2], 2),
        "median until healed": round(sorted(kill["heal"] for kill in kills)[len(kills) // 2], 2),
        "largest relative difference of a loss": largest,
        "seconds": round(time.monotonic() - began), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(facts))
    if facts["most steps lost"] > 1:
        raise SystemExit("a survivor lost more than one step")
    if largest > 0.01:
        raise SystemExit("a step has another loss than without kills")


if __name__ == "__main__":
    main()
