"""Run the test suites of transformers and PEFT with moeify's experts: what passes without them must pass with them.

    python tests/suites/run.py                                  clones both at the installed versions
    python tests/suites/run.py --only common                    the package index in the place of a clone of 1.3 GB
    python tests/suites/run.py --peft FOLDER --only peft        a repository on this disk
    python tests/suites/run.py --peft FOLDER --only peft --offline tests/test_target_parameters.py

`common` are the tests that transformers runs on every model, from its source distribution (`families.py`).
Every suite runs twice, without moeify and with the plugin `behind.py`, which says how many calls of experts it
computed; exits with 1 if a test passes only without it, or if none passes at all. Paths of tests take the place of
those listed here, and other options are pytest's. `--offline` lets tiny random models stand in for some of the hub's
(`offline.py`), and refuses what else is asked of the hub at once: such tests fail both times, and are counted.
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
from xml.etree import ElementTree

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "glm4_moe"]
SUITES = {
    "transformers": [f"tests/models/{family}/test_modeling_{family}.py" for family in FAMILIES],
    "common": ["tests/test_families.py"],
    "peft": ["tests/test_target_parameters.py", "tests/test_custom_models.py", "tests/test_arrow.py"],
}
BEHIND = Path(__file__).parent


def repository(library: str, folder: Path) -> Path:
    """A clone of a library's repository at the version that is installed."""
    url, tag = f"https://github.com/huggingface/{library}", f"v{version(library)}"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", "--branch", tag, url, str(folder)], check=True)
    return folder


def source_distribution(folder: Path) -> Path:
    """The common tests of the installed transformers as the package index has them, with the families beside them."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), f"transformers=={version('transformers')}"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, [m for m in archive if "/tests/" in m.name], filter="data")
    where = next(path.parent for path in folder.glob("*/tests"))
    for name, mixin in (("exporters/test_export", "Export"), ("generation/test_utils", "Generation")):
        (where / "tests" / name).parent.mkdir()  # the distribution leaves these two out
        (where / "tests" / f"{name}.py").write_text(f"class {mixin}TesterMixin:\n    pass\n", encoding="utf-8")
    for package in ("", "exporters", "generation"):
        (where / "tests" / package / "__init__.py").touch()
    shutil.copy(BEHIND / "families.py", where / "tests" / "test_families.py")
    return where


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


def compare(library: str, where: Path, options: list[str], *, offline: bool) -> int:
    """Run a suite both ways, and print what passes only without moeify.

    Returns:
        How many tests these are.

    Raises:
        SystemExit: no test passed without moeify, which shows nothing.
    """
    given = [word for word in options if not word.startswith("-") and (where / word.split("::")[0]).exists()]
    files = given or [file for file in SUITES[library] if (where / file).exists()]
    others, plugins = [word for word in options if word not in given], ["offline"] * offline
    without, beside = (outcomes(where, files, others, plugins + more) for more in ([], ["behind"]))
    broken = [name for name, end in without.items() if end == "passed" and beside.get(name) != "passed"]
    print(f"{library}: without moeify {dict(Counter(without.values()))}, with it {dict(Counter(beside.values()))}")
    for name in broken:
        print(f"  passes only without moeify: {name}")
    if "passed" not in without.values():
        sys.exit(f"no test of {library} passed without moeify either, so that nothing is shown; see the errors above")
    return len(broken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SUITES, nargs="+", default=["transformers", "peft"])
    for library in ("transformers", "peft"):
        parser.add_argument(f"--{library}", type=Path, help="a clone of its repository; by default one is made")
    parser.add_argument("--offline", action="store_true", help="ask the hub for nothing")
    given, options = parser.parse_known_args()
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        for library in given.only:
            (into := Path(folder) / library).mkdir()
            fetched = source_distribution if library == "common" else partial(repository, library)
            where = getattr(given, library, None) or fetched(into)
            broken += compare(library, where.resolve(), options, offline=given.offline)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
