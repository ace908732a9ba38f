"""Our routers against implementations that others wrote: decisions, outputs and gradients for the same weights.

google-research/vmoe (JAX), the code of V-MoE and Soft MoE, lucidrains' soft-moe-pytorch and st-moe-pytorch, MMoE and
PLE of deepctr-torch, and Engram of its authors. Peers run in an environment of their own; inputs and answers travel as
.npz. Random draws are handed to both sides. What is known to differ is measured too, with the reason; any other
difference is a failure.

    python -m venv peers && peers/bin/pip install jax flax clu soft-moe-pytorch st-moe-pytorch deepctr-torch
    git clone https://github.com/google-research/vmoe
    git clone https://github.com/deepseek-ai/Engram
    python claims/independent.py --python peers/bin/python --vmoe vmoe --engram Engram
                                                                           appends to claims/results/independent.csv
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers.our_engram import against_engram, engram_inputs
from peers.ours import Values, against_deepctr, against_lucidrains, against_vmoe, inputs, multi_task_inputs
from results import append

TOLERANCE = 1e-5
LIBRARIES = "lucidrains"

EXPLAINED = {
    "vmoe expert choice by 4": "V-MoE's default rounds slots up to a multiple of 4, ExpertChoice up to a whole number",
    "vmoe soft as shipped": "the shipped dispatcher casts rows to bfloat16",
    "vmoe noisy top-2 gshard_loss": "GShard counts first choices, losses.balance every choice",
    "lucidrains top-2 straight-through gradients": "a second gradient reaches the router through the dispatched rows",
    "lucidrains top-2 balance": "the peer counts first choices that were kept, losses.balance every choice asked for",
    "lucidrains top-2 balance | balance(demand=first choices)": "the peer's mask of first choices is changed in place "
    "when rows are dropped, so it counts those that were kept",
    "lucidrains soft y | of the tokens as they are": "the peer's experts read normalised tokens, the paper's tokens",
}


def differences(ours: Values, theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """By `case quantity`: pairs decided otherwise, and the largest difference relative to the largest value."""
    found: dict[str, float] = {}
    for name, value in ours.items():
        a, key = value.detach().numpy().astype(np.float64), name.partition(" | ")[0]
        b = theirs[key].reshape(a.shape).astype(np.float64)
        case, _, quantity = name.partition("/")
        if quantity == "weights":
            found[f"{case} decisions"] = float(((a > 0) != (b > 0)).sum())
        row = f"{case} gradients" if quantity.startswith("grad ") else f"{case} {quantity}".strip()
        found[row] = max(found.get(row, 0.0), float(np.abs(a - b).max() / np.abs(b).max()))
    return found


def ask(peer: str, script: str, python: str, given: Values, *arguments: str) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "inputs.npz", Path(folder) / "answers.npz"
        np.savez(asked, **{name: value.numpy() for name, value in given.items()})
        command = [python, str(Path(__file__).parent / "peers" / script), str(asked), str(answered), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{peer} failed:\n{done.stderr}")
        return dict(np.load(answered))


def has(python: str | None, *modules: str) -> bool:
    """Whether an interpreter is there and can import the modules."""
    if python is None or not Path(python).exists():
        return False
    return subprocess.run([python, "-c", f"import {', '.join(modules)}"], capture_output=True).returncode == 0


def judge(peer: str, version: str, ours: Values, theirs: dict[str, np.ndarray]) -> int:
    """Print and keep every comparison; return how many failed."""
    failed = 0
    for row, difference in differences(ours, theirs).items():
        name = f"{peer} {row}"
        known = (why for what, why in EXPLAINED.items() if f"{name} ".startswith(f"{what} "))
        reason = EXPLAINED.get(name, "") if "|" in name else next(known, "")
        agrees = difference <= TOLERANCE
        result = "agrees" if agrees else "differs, explained" if reason else "disagrees"
        failed += result == "disagrees"
        append("independent", {
            "peer": peer, "version": version, "quantity": row, "difference": f"{difference:.2e}",
            "tolerance": TOLERANCE, "result": result, "reason": "" if agrees else reason,
        })  # fmt: skip
        print(f"{result:19} {difference:.1e}  {name}" + (f"  ({reason})" if reason and not agrees else ""))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="an interpreter that has the peers' packages")
    parser.add_argument("--vmoe", help="a checkout of google-research/vmoe")
    parser.add_argument("--engram", help="a checkout of deepseek-ai/Engram, whose demo needs sympy and transformers")
    options = parser.parse_args()
    given, failed = inputs(), 0
    if options.vmoe is not None and Path(options.vmoe).exists() and has(options.python, "jax", "flax"):
        theirs = ask("vmoe", "vmoe_jax.py", options.python, given, options.vmoe)
        failed += judge("vmoe", str(theirs["version"]), against_vmoe(given), theirs)
    else:
        print("vmoe: not run (peer missing)")
    if has(options.python, "soft_moe_pytorch", "st_moe_pytorch"):
        theirs = ask(LIBRARIES, "lucidrains.py", options.python, given)
        failed += judge(LIBRARIES, str(theirs["version"]), against_lucidrains(given), theirs)
    else:
        print(f"{LIBRARIES}: not run (peer missing)")
    if has(options.python, "deepctr_torch"):
        given = multi_task_inputs()
        theirs = ask("deepctr", "deepctr.py", options.python, given)
        failed += judge("deepctr", str(theirs["version"]), against_deepctr(given), theirs)
    else:
        print("deepctr: not run (peer missing)")
    if options.engram is not None and Path(options.engram, "engram_demo_v1.py").is_file():
        given = engram_inputs()
        theirs = ask("engram", "engram_authors.py", options.python or sys.executable, given, options.engram)
        failed += judge("deepseek-ai/Engram", str(theirs["version"]), against_engram(given), theirs)
    else:
        print("engram: not run (peer missing)")
    if failed:
        sys.exit(f"{failed} comparisons disagree")


if __name__ == "__main__":
    main()
