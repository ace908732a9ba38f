"""Run all benchmarks of a CPU, one after another, within a time, and go on later where it was too short.

Each program gets its part of the minutes that are left, and leaves to the next what it does not need. Where its part is
short it measures fewer rounds, one at least, leaves out peers that would take too long, and then measures fewer points.
One that is a minute late is ended, which loses the point that it is at. What has rows of this commit and machine is
left out, so the same command measures the rest; `--again` measures all. A program that fails does not stop the others.

With `--avx2` torch, oneDNN, MKL and our kernels use no instructions beyond AVX2, as on a processor that has no more; a
llama.cpp that was built with others is refused.

    python benchmarks/all.py
    python benchmarks/all.py --minutes 5 --results /tmp/results
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_build import why_not

PROGRAMS = {
    "startup": 1, "price": 6, "train_step": 5, "load": 2, "peak": 4, "callback": 5, "scaling": 6, "roofline": 5,
    "decode": 8, "run": 14,
}  # fmt: skip
"""Programs and their parts of the time, that with the most points last."""
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "KT_KERNEL_CPU_VARIANT": "avx2",
}  # fmt: skip
GRACE = 60  # seconds that a program may take longer than its part, its start included
FILES = {"run": "layer-cpu", "train_step": "train-cpu"}
OPTIONS = {"run": ["--device", "cpu"], "load": ["--threads", "2"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=55, help="for all of them (55)")
    options.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    options.add_argument("--again", action="store_true", help="measure also what has rows of this commit and machine")
    options.add_argument("--avx2", action="store_true", help="use no instructions beyond AVX2")
    options.add_argument("--hardware", help="the name of the hardware in the rows")
    options.add_argument("--llama", type=Path, help="folder of llama-bench and llama-quantize, for decode.py")
    options.add_argument("--results", type=Path, help="another folder for rows and pictures")
    chosen = options.parse_args()
    if chosen.llama and (reason := why_not(chosen.llama, avx2=chosen.avx2)):
        options.error(reason)
    end, failed, late = time.monotonic() + 60 * chosen.minutes, [], []
    for number, name in enumerate(chosen.programs):
        left = (end - time.monotonic()) / 60
        if left <= 0:
            late += chosen.programs[number:]
            break
        minutes = left * PROGRAMS[name] / sum(PROGRAMS[each] for each in chosen.programs[number:])
        print(f"{name}.py, {minutes:.1f} of {left:.1f} minutes", flush=True)
        status = run(command(name, minutes, chosen), 60 * minutes + GRACE, AVX2 if chosen.avx2 else {})
        if status is None:
            late.append(name)
        elif status:
            failed.append(name)
    if late:
        print(f"the time is up for {', '.join(late)}; the same command measures what is left")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; their errors are above")


def run(words: list[str], seconds: float, variables: dict[str, str]) -> int | None:
    """The exit status of a program, None if it was ended, with all processes that it started and their files."""
    with (
        tempfile.TemporaryDirectory(prefix="moeify-bench-") as folder,
        subprocess.Popen(words, env=os.environ | variables | {"TMPDIR": folder}, start_new_session=True) as program,
    ):
        try:
            return program.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)


def command(name: str, minutes: float, chosen: argparse.Namespace) -> list[str]:
    """The command of one program."""
    words = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--minutes", f"{minutes:.3f}"]
    words += OPTIONS.get(name, []) + ([] if chosen.again else ["--resume"])
    words += ["--hardware", chosen.hardware] if chosen.hardware else []
    words += ["--llama", str(chosen.llama)] if chosen.llama and name == "decode" else []
    if chosen.results:
        words += ["--out", str(chosen.results / f"{FILES.get(name, f'{name}-cpu')}.csv")]
        words += ["--picture", str(chosen.results / f"cpu-{name}.png")] if name in ("scaling", "roofline") else []
    return words


if __name__ == "__main__":
    main()
