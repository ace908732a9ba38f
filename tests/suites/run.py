"""Run the test suites of transformers and PEFT with moeify's experts: what passes without them must pass with them.

    python tests/suites/run.py                                  both at the installed versions, from the package index
    python tests/suites/run.py --offline                        the same without huggingface.co
    python tests/suites/run.py --only transformers              the families' own files, which need a clone of 1.3 GB
    python tests/suites/run.py --peft FOLDER --only peft        a repository on this disk
    python tests/suites/run.py --only peft --offline tests/test_custom_models.py

`common` are the tests that transformers runs on every model (`families.py`); with PEFT's tests of adapters on experts
they come from the source distributions. Every suite runs twice, without moeify and with the plugin `behind.py`, which
says how many calls of experts it computed; exits with 1 if a test passes only without it, or if none passes at all.
Paths of tests take the place of those listed here, and other options are pytest's. `--offline` lets tiny random models
stand in for some of the hub's (`offline.py`), and refuses what else is asked of the hub at once: such tests fail both
times, and are counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen
from xml.etree import ElementTree

from huggingface_hub.constants import ENDPOINT

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]
SUITES = {
    "transformers": [f"tests/models/{family}/test_modeling_{family}.py" for family in FAMILIES],
    "common": ["tests/test_families.py"],
    "peft": ["tests/test_target_parameters.py", "tests/test_arrow.py"],
}
BEHIND = Path(__file__).parent


def fetch(command: list[str], source: str) -> None:
    """Run the command that brings a library's tests here, or say what else can be done."""
    if subprocess.run(command).returncode:
        sys.exit(f"{source} did not give the tests; --transformers and --peft take folders with a repository of each")


def repository(library: str, folder: Path) -> Path:
    """A clone of a library's repository at the version that is installed."""
    url, tag = f"https://github.com/huggingface/{library}", f"v{version(library)}"
    fetch(["git", "clone", "--quiet", "--depth", "1", "--branch", tag, url, str(folder)], "github.com")
    return folder


def source_distribution(library: str, folder: Path) -> Path:
    """The tests of an installed library as the package index has them."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    fetch([*pip, "--dest", str(folder), f"{library}=={version(library)}"], "the package index")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, [m for m in archive if "/tests/" in m.name], filter="data")
    where = next(path.parent for path in folder.glob("*/tests"))
    (where / "tests" / "__init__.py").touch()
    return where


def common(folder: Path) -> Path:
    """The tests that transformers runs on every model, with the families beside them."""
    where = source_distribution("transformers", folder)
    for name, mixin in (("exporters/test_export", "Export"), ("generation/test_utils", "Generation")):
        (where / "tests" / name).parent.mkdir()  # the distribution leaves these two out
        (where / "tests" / f"{name}.py").write_text(f"class {mixin}TesterMixin:\n    pass\n", encoding="utf-8")
    for package in ("exporters", "generation"):
        (where / "tests" / package / "__init__.py").touch()
    shutil.copy(BEHIND / "families.py", where / "tests" / "test_families.py")
    return where


FETCHED = {
    "common": common,
    "peft": partial(source_distribution, "peft"),
    "transformers": partial(repository, "transformers"),
}


def require_hub() -> None:
    """Refuse to run tests that would wait for a hub that is out of reach."""
    try:
        urlopen(ENDPOINT, timeout=10).close()
    except OSError as error:
        sys.exit(f"{ENDPOINT} is out of reach ({error}); --offline runs the tests that need nothing of it")


def outcomes(where: Path, files: list[str], options: list[str], plugins: list[str]) -> dict[str, str]:
    """How every test of some files ended: passed, skipped, failure or error."""
    chosen = [word for plugin in plugins for word in ("-p", plugin)]
    path = os.pathsep.join([str(where), str(BEHIND), *sys.path[1:]])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-o", "filterwarnings=", *chosen]
        command += [*files, *options, "--junitxml", str(report)]
        subprocess.run(command, cwd=where, env=os.environ | {"PYTHONPATH": path})
        if not report.exists():
            sys.exit(f"pytest ended without a report in {where}")
        tests = ElementTree.parse(report).iter("testcase")
        return {f"{t.get('classname')}::{t.get('name')}": next((e.tag for e in t), "passed") for t in tests}


def compare(suite: str, where: Path, options: list[str], *, offline: bool) -> int:
    """Run a suite both ways, and print what passes only without moeify.

    Returns:
        How many tests these are.

    Raises:
        SystemExit: no test passed without moeify, which shows nothing.
    """
    given = [word for word in options if not word.startswith("-") and (where / word.split("::")[0]).exists()]
    files = given or [file for file in SUITES[suite] if (where / file).exists()]
    others, plugins = [word for word in options if word not in given], ["offline"] * offline
    without, beside = (outcomes(where, files, others, plugins + more) for more in ([], ["behind"]))
    broken = [name for name, end in without.items() if end == "passed" and beside.get(name) != "passed"]
    print(f"{suite}: without moeify {dict(Counter(without.values()))}, with it {dict(Counter(beside.values()))}")
    for name in broken:
        print(f"  passes only without moeify: {name}")
    if "passed" not in without.values():
        sys.exit(f"no test of {suite} passed without moeify either, so that nothing is shown; see the errors above")
    return len(broken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SUITES, nargs="+", default=["common", "peft"])
    for library in ("transformers", "peft"):
        parser.add_argument(f"--{library}", type=Path, help="a folder with its repository; by default it is fetched")
    parser.add_argument("--offline", action="store_true", help="ask the hub for nothing")
    given, options = parser.parse_known_args()
    if not given.offline:
        require_hub()
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        for suite in given.only:
            (into := Path(folder) / suite).mkdir()
            where = getattr(given, suite, None) or FETCHED[suite](into)
            broken += compare(suite, where.resolve(), options, offline=given.offline)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
