"""Every variable of the environment is declared once, documented, and read through its declaration."""

import re
import tempfile
from pathlib import Path

import pytest

from moeify import env
from moeify.kernels.cpu.cpp import LEVELS

ROOT = Path(__file__).parents[1]


def test_the_page_lists_the_variables_that_are_declared():
    page = (ROOT / "docs/guide/environment.md").read_text("utf-8")
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in page.splitlines() if "MOEIFY_" in row]
    declared = [
        [
            f"`{variable.name}`",
            variable.default if "`" in variable.default else f"`{variable.default}`",
            ", ".join(f"`{value}`" for value in variable.allowed) or variable.sort,
            variable.meaning,
        ]
        for variable in env.VARIABLES
    ]
    assert rows == declared


def test_nothing_else_reads_a_variable_of_ours():
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("claims/**/*.py")]
    readers = [file for file in files if re.search(r"environ.*MOEIFY_|getenv.*MOEIFY_", file.read_text("utf-8"))]
    assert not readers
    declared = {variable.name for variable in env.VARIABLES}
    used = {name for file in files for name in re.findall(r"MOEIFY_[A-Z0-9_]+", file.read_text("utf-8"))}
    assert used == declared


@pytest.mark.parametrize("variable", [v for v in env.VARIABLES if v.allowed], ids=lambda variable: variable.name)
def test_a_value_that_is_not_allowed_is_refused_with_those_that_are(variable, monkeypatch):
    monkeypatch.setenv(variable.name, "yes please")
    with pytest.raises(ValueError, match=f"{variable.name}=yes please .*choose one of {', '.join(variable.allowed)}"):
        _ = variable.value
    for value in variable.allowed:
        monkeypatch.setenv(variable.name, value)
        assert variable.value == value
        assert variable.is_on == (value == "1")


@pytest.mark.parametrize("variable", [v for v in env.VARIABLES if v.allowed], ids=lambda variable: variable.name)
def test_an_empty_value_is_the_default(variable, monkeypatch):
    monkeypatch.setenv(variable.name, "")
    assert variable.value == variable.default
    monkeypatch.delenv(variable.name)
    assert variable.value == variable.default


def test_the_kernels_of_cpp_may_have_the_instruction_sets_that_there_are():
    assert env.CPP.allowed == ("0", "1", *LEVELS)


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_there_is_one_folder_for_all_that_is_compiled(tmp_path, monkeypatch):
    for name in ("MOEIFY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert env.cache_folder() == Path.home() / ".cache/moeify"
    monkeypatch.setattr(Path, "home", _no_home)
    assert env.cache_folder().parent == Path(tempfile.gettempdir())
    monkeypatch.delattr("os.getuid")  # as on Windows
    assert env.cache_folder() == Path(tempfile.gettempdir()) / "moeify"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_folder() == tmp_path / "moeify"
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "mine"))
    assert env.cache_folder() == tmp_path / "mine"
