"""The demo over three seeds: a sparse model and its dense twin, at equal tokens, training FLOPs and wall-clock time.

python claims/demo.py                       runs `moeify compare` first, about 8 minutes on two cores
python claims/demo.py --run runs/compare    takes the results of a run that is there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from results import append


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/claim-demo"))
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    if not (options.run / "summary.json").is_file():
        subprocess.run([sys.executable, "-m", "moeify", "compare", "--output", str(options.run)], check=True)
    summary = json.loads((options.run / "summary.json").read_text())
    facts = summary["facts"]
    for axis, found in summary["at_equal"].items():
        append("demo", {
            "hardware": options.hardware, "threads": facts["threads"], "corpus": facts["corpus sha256"][:12],
            "steps": facts["steps"], "seeds": found["seeds"], "at_equal": axis,
            **{name: f"{found[name]:.4f}" for name in ("sparse", "dense", "difference", "spread")},
        })  # fmt: skip
        print(f"at equal {axis}: {found['difference']:+.4f} ± {found['spread']:.4f} over {found['seeds']} seeds")


if __name__ == "__main__":
    main()
