"""`moeify watch`: follow a training run in the terminal: loss, time left, and expert load of every layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

Entry = dict[str, Any]

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Columns of the picture of a layer's load; experts share them where there are more."""
ROWS_ABOVE = 8
"""Lines of a terminal that are not for layers."""


def watch(
    run: Annotated[Path, typer.Argument(help="The folder of moeify train, or one that RoutingCallback writes to")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the log")] = 1.0,
) -> None:
    """Follow a training, running or finished: loss, speed, time left, and how evenly every layer loads its experts.

    In a terminal the view changes in place; elsewhere every log entry is a line. It ends when the run ends, and Ctrl-C
    leaves the run alone.
    """
    from rich.console import Console

    console = Console(highlight=False)
    log = Log(run)
    if not log.look() and not log.is_running:
        raise FileNotFoundError(
            f"{run} has no metrics.jsonl, and no process trains into it; name the folder of moeify train, or the "
            "output_dir of a trainer with RoutingCallback"
        )
    try:
        if console.is_terminal:
            _show(log, console, every)
        else:
            for text in _lines(log, every):
                console.print(text, soft_wrap=True)
    except KeyboardInterrupt:
        return
    console.print(_end(log), soft_wrap=True)


class Log:
    """The entries of the newest log of a run, read as far as they are written; of a finished one, the sparse model's.

    Args:
        run: the folder of a training, or of several, as `moeify train` makes it.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.began_running = self.is_running
        self.file: Path | None = None
        self.entries: list[Entry] = []
        self._read = 0

    def look(self) -> list[Entry]:
        """The entries that are new; all of them where another log is newer now, or a resumed run cut this one off."""
        from moeify.train.run_log import LOG, parse

        folders = _trainings(self.run, "sparse", *(["dense"] if self.began_running else []))
        found = [folder / LOG for folder in folders if (folder / LOG).is_file()]
        newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
        if newest is None:
            return []
        if newest != self.file or newest.stat().st_size < self._read:
            self.file, self.entries, self._read = newest, [], 0
        with newest.open("rb") as lines:
            lines.seek(self._read)
            whole = lines.read().rpartition(b"\n")[0]
        self._read += len(whole) + 1 if whole else 0
        new = [entry for each in whole.splitlines() if (entry := parse(each)) is not None and "loss" in entry]
        self.entries += new
        return new

    @property
    def is_running(self) -> bool:
        """Whether a process trains into the folder."""
        from moeify.folders import RUN_LOCK, is_locked

        return any(is_locked(folder / RUN_LOCK) for folder in {self.run, *_trainings(self.run, "sparse", "dense")})

    @property
    def seconds_left(self) -> float | None:
        """The remaining time at the speed of the last entries, None if it is unknown."""
        known = [entry for entry in self.entries[-50:] if "time" in entry and "max_steps" in entry]
        if len(known) < 2 or known[-1]["step"] <= known[0]["step"]:
            return None
        first, last = known[0], known[-1]
        pace = (last["time"] - first["time"]) / (last["step"] - first["step"])
        return pace * max(0, last["max_steps"] - last["step"])


def _trainings(run: Path, *kinds: str) -> list[Path]:
    """The folders of the trainings of a run: those of some kinds that `moeify train` makes, or itself."""
    return [folder for kind in kinds for folder in sorted(run.glob(f"{kind}-*"))] or [run]


def _lines(log: Log, every: float) -> Iterator[str]:
    """Entries as they are written, until the run has ended, and the folder where another one is written to."""
    folder, new, running = None, log.entries, True
    while running or new:
        if log.file is not None and log.file.parent != folder:
            folder = log.file.parent
            yield str(folder)
        yield from (line(entry, log.seconds_left if entry is new[-1] else None) for entry in new)
        if running := log.is_running:
            time.sleep(every)
        new = log.look()


def _show(log: Log, console: Console, every: float) -> None:
    from rich.live import Live

    with Live(view(log, console), console=console, auto_refresh=False) as live:
        while log.is_running:
            time.sleep(every)
            log.look()
            live.update(view(log, console), refresh=True)
        log = Log(log.run)  # of the sparse model, when the dense one has been trained as well
        log.look()
        live.update(view(log, console), refresh=True)


def _end(log: Log) -> str:
    if not log.entries:
        return f"{log.run}: the run has ended, and nothing was logged"
    last = log.entries[-1]
    most = last.get("max_steps", last["step"])
    return f"{log.run}: the run has ended after step {last['step']} of {most}"


def line(entry: Entry, seconds_left: float | None) -> str:
    """A log entry in one line."""
    from moeify.train.callbacks import line as figures

    most = f"/{entry['max_steps']}" if "max_steps" in entry else ""
    vio = f"  MaxVio {entry['max_vio']:.2f}" if "max_vio" in entry else ""
    return f"step {entry['step']}{most}  {figures(entry)}{vio}{_left(seconds_left)}"


def _left(seconds: float | None) -> str:
    if not seconds:
        return ""
    return f"  {seconds:,.0f} s left" if seconds < 100 else f"  {seconds / 60:,.0f} min left"


def view(log: Log, console: Console) -> RenderableType:
    """The metrics of the latest entry, and a row per layer; in a small terminal only the least balanced layers."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if not log.entries:
        return Text(f"{log.run}: waiting for the first log entry")
    last = log.entries[-1]
    title = Text(f"{(log.file or log.run).parent}", style="bold")
    bar = Table.grid()
    bar.add_row(
        ProgressBar(total=last.get("max_steps", last["step"]), completed=last["step"], width=min(60, console.width))
    )
    parts: list[RenderableType] = [title, Text(line(last, log.seconds_left)), bar]
    if last.get("layers"):
        parts.append(_table(last["layers"], max(3, console.height - ROWS_ABOVE)))
    return Group(*parts)


def _table(layers: dict[str, Entry], room: int) -> Table:
    from rich.table import Table

    worst = sorted(layers, key=lambda name: -layers[name]["max_vio"])[:room]
    left_out = len(layers) - len(worst)
    table = Table(box=None, caption=f"{left_out} more layers are loaded more evenly" if left_out else None)
    for heading in ("layer", "load of its experts", "MaxVio", "dead", "entropy"):
        table.add_column(heading, no_wrap=True)
    for name in (name for name in layers if name in worst):
        layer = layers[name]
        dead = int(layer["dead_experts"])
        table.add_row(
            name, picture(layer.get("rows", [])), f"{layer['max_vio']:.2f}",
            f"{dead}" if not dead else f"[bold red]{dead}", f"{layer['load_entropy']:.3f}",
        )  # fmt: skip
    return table


def picture(rows: list[int]) -> str:
    """A column for every expert, or for equally many of them, whose height is its load relative to the largest."""
    each = -(-len(rows) // WIDTH)
    loads = [sum(rows[i : i + each]) / len(rows[i : i + each]) for i in range(0, len(rows), each or 1)]
    most = max(loads, default=0)
    return "".join(" " if not load else BARS[round((len(BARS) - 1) * load / most)] for load in loads)
