"""`moeify reproduce`: list the claims of a checkout with what each takes, or run them again."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import moeify
from moeify import env
from moeify.registry import suggest

RUNS = "claims/runs.toml"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A program of `claims/`, and what `claims/runs.toml` says of it.

    Attributes:
        script: the program.
        minutes: of CPU that the full run takes, on one core.
        seeds: of the full run.
        full: options of the full run, one list per call.
        quick: options of the quick run, or None where there is none.
        quick_minutes: of CPU that the quick run takes.
        needs: "data" for the folder that MOEIFY_DATA names, packages, and options that name peers.
    """

    script: Path
    minutes: float
    seeds: int
    full: Sequence[Sequence[str]] = ((),)
    quick: Sequence[str] | None = None
    quick_minutes: float = 0.0
    needs: str = ""

    @property
    def title(self) -> str:
        """The first paragraph of the program's docstring, as one line."""
        text = ast.get_docstring(ast.parse(self.script.read_text(encoding="utf-8"))) or ""
        return " ".join(text.partition("\n\n")[0].split())


def reproduce(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="A claim; further options are its own", show_default="list")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run every claim, one after the other")] = False,
    full: Annotated[bool, typer.Option("--full", help="With --all: all seeds, not the quick runs")] = False,
    record: Annotated[bool, typer.Option("--record", help="Append rows to claims/results, not to --output")] = False,
    output: Annotated[Path, typer.Option(help="The folder for rows")] = Path("runs/claims"),
    checkout: Annotated[Path | None, typer.Option(help="A checkout of moeify", show_default="found")] = None,
) -> None:
    """Run claims of papers again, or list them; claims are in a checkout of moeify, not in the installed package."""
    root = _checkout(checkout)
    claims = read_claims(root)
    if name is None and not everything:
        print("\n".join(_listed(claims, root)))
        return
    if name is not None and everything:
        raise ValueError(f"--all runs every claim, {name} among them; give one of the two")
    if everything and context.args:
        raise ValueError(f"{' '.join(context.args)} would go to every claim; options are for a single one")
    if name is not None and name not in claims:
        raise ValueError(f"no claim is called {name!r}; {suggest(name, list(claims))}")
    variables = dict(os.environ) if record else os.environ | {env.CLAIM_RESULTS.name: str(output.absolute())}
    chosen = claims if everything else {name: claims[name] for name in [name] if name}
    ended = {}
    for each, claim in chosen.items():
        calls = [context.args] if context.args else _calls(claim, full or not everything)
        if missing := _missing(claim, context.args):
            if not everything:
                raise ValueError(f"{each} cannot run: {missing}")
            print(f"{each}: not run: {missing}")
            continue
        if not calls:
            print(f"{each}: has no quick run; --full takes {claim.minutes:g} minutes")
        for options in calls:
            print(f"{each}: python claims/{each}.py {' '.join(options)}".rstrip(), flush=True)
            command = [sys.executable, str(claim.script), *options]
            ended[each] = max(ended.get(each, 0), abs(subprocess.run(command, cwd=root, env=variables).returncode))
    print(f"rows are in {root / 'claims' / 'results' if record else output.absolute()}")
    failed = [each for each, code in ended.items() if code]
    if failed:
        print(f"ended with an error: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def read_claims(root: Path) -> dict[str, Claim]:
    """The claims of a checkout by name.

    Raises:
        ValueError: `claims/runs.toml` has a claim without a program, or fields that it cannot have.
    """
    found = {}
    for name, values in tomllib.loads((root / RUNS).read_text(encoding="utf-8")).items():
        script = root / "claims" / f"{name}.py"
        if not script.is_file():
            raise ValueError(f"{RUNS} has {name}, and there is no claims/{name}.py")
        try:
            found[name] = Claim(script=script, **values)
        except TypeError as error:
            raise ValueError(f"{RUNS}: {name}: {error}") from error
    return found


def _checkout(named: Path | None) -> Path:
    here, package = Path.cwd(), Path(moeify.__file__).resolve()
    places = [named] if named is not None else [here, *here.parents, *package.parents]
    for place in places:
        if (place / RUNS).is_file():
            return place.resolve()
    where = f"{named} is" if named else "this folder is"
    raise FileNotFoundError(
        f"{where} no checkout of moeify (no {RUNS}), and the installed package has no claims: clone the repository, "
        "pip install it there, and run the command in it, or name it by --checkout"
    )


def _missing(claim: Claim, options: Sequence[str]) -> str:
    """What the claim needs and does not have, and the way out; nothing if it can run."""
    if "data" in claim.needs and env.DATA.path is None:
        return f"it reads files of the data folder; set {env.DATA.name} to its path"
    needed = [each for each in claim.needs.split(", ") if each not in ("", "data")]
    packages = [each for each in needed if not each.startswith("--")]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        return f"{missing[0]} is not installed: pip install {missing[0]}"
    peer = ", ".join(each for each in needed if each.startswith("--"))
    return f"it compares with a copy of somebody else's work; name it by {peer}" if peer and not options else ""


def _calls(claim: Claim, full: bool) -> Sequence[Sequence[str]]:
    if full:
        return claim.full
    return [] if claim.quick is None else [claim.quick]


def _listed(claims: dict[str, Claim], root: Path) -> Sequence[str]:
    lines = []
    for name, claim in claims.items():
        quick = "none" if claim.quick is None else f"{claim.quick_minutes:g} min"
        needs = re.sub(r"\bdata\b", env.DATA.name, claim.needs)
        lines.append(
            f"{name:17} {claim.minutes:g} min, {claim.seeds} seed{'s' * (claim.seeds != 1)}; quick: {quick}"
            + (f"; needs {needs}" if needs else "")
        )
        lines.append(f"  {claim.title}")
    total, quick = (sum(getattr(claim, field) for claim in claims.values()) for field in ("minutes", "quick_minutes"))
    lines.append(f"all of {root / 'claims'}: {quick:g} minutes of CPU on one core, with --full {total:g}")
    lines.append("moeify reproduce NAME [OPTIONS] runs one, moeify reproduce --all the quick runs of all")
    return lines
