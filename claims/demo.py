"""The demo over three seeds: a sparse model and its dense baseline, at equal tokens, training FLOPs and time.

Time is what a step costs both, measured by turns: by the clock on the wall, or of the CPU where work of others makes
that unsteady. `clear` says whether the sign of the difference is beyond the noise of the seeds and of this cost.

python claims/demo.py --seed 31             runs `moeify compare` in runs/claim-demo-31, 8 minutes on two idle cores
python claims/demo.py --run runs/compare    takes the results of a run that is there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from results import append

from moeify.evaluate.pace import Pace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a comparison that is there")
    parser.add_argument("--seed", type=int, default=0, help="the first of the three seeds")
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    run = options.run or Path(f"runs/claim-demo-{options.seed}")
    if options.run is None:
        compare = [sys.executable, "-m", "moeify", "compare", "--output", str(run), "--seed", str(options.seed)]
        subprocess.run(compare, check=True)
    summary = json.loads((run / "summary.json").read_text())
    facts, clock = summary["facts"], summary["pace"].pop("clock")
    pace = Pace.from_dict(summary["pace"])
    for axis, found in summary["at_equal"].items():
        append("demo", {
            "hardware": options.hardware, "threads": facts["threads"], "corpus": facts["corpus sha256"][:12],
            "steps": facts["steps"], "first_seed": summary["runs"][0]["seed"], "seeds": found["seeds"],
            "balance": facts["balance"], "clock": clock, "step_ratio": f"{pace.ratio:.3f}", "at_equal": axis,
            **{name: f"{found[name]:.4f}" for name in ("sparse", "dense", "difference", "spread")},
            "clear": found["is_clear"],
        })  # fmt: skip
        noise = "" if found["is_clear"] else ", too noisy to tell"
        print(f"at equal {axis}: {found['difference']:+.4f} ± {found['spread']:.4f} over {found['seeds']} seeds{noise}")


if __name__ == "__main__":
    main()
