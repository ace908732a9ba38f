"""The documentation runs, and leaves no public name out."""

import importlib
import re
from pathlib import Path

import pytest

from command_line import moeify
from moeify.backends import order
from moeify.registry import lookup, names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ["moeify", "moeify.sparsify", "moeify.routers", "moeify.experts", "moeify.train"]
OTHERWISE = {"anywhere"}  # runs with its commands, in tests/export/test_anywhere_page.py
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if "```python" in page.read_text("utf-8") and page.stem not in OTHERWISE
]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_python_runs_in_the_order_of_its_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(order, "_ORDER", list(order._ORDER))
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


TRAIN = re.findall(r"^moeify train (.*?)(?: *#.*)?$", text(DOCS / "guide" / "tasks.md"), re.MULTILINE)


@pytest.mark.parametrize("arguments", TRAIN)
def test_every_command_of_the_tasks_is_one_that_could_run(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml = re.findall(r"```yaml\n(.*?)```", text(DOCS / "guide" / "tasks.md"), re.DOTALL)
    (tmp_path / "job.yaml").write_text(yaml[0])
    ended = moeify("train", *arguments.split(), "--print-config")
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented_in_code_and_in_docs(package):
    module = importlib.import_module(package)
    pages = "\n".join(text(page) for page in DOCS.rglob("*.md"))
    things = {name: getattr(module, name) for name in module.__all__}
    described = {name for name, thing in things.items() if (thing.__doc__ or "").partition("(")[0] != name}
    assert not things.keys() - described
    assert not {name for name in things if not re.search(rf"\b{name}\b", pages)}


def test_the_readme_says_the_main_things_on_its_first_screen():
    screen = "\n".join(text(ROOT / "README.md").splitlines()[:40])
    for thing in ("make demo", "make test", "sparsify(", "SparseTrainer(", "save(", "load(", "architecture.svg"):
        assert thing in screen


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=str)
def test_every_link_to_a_file_leads_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text(page))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_everything_with_a_name_is_on_a_page_of_methods():
    pages = "\n".join(text(page) for page in (DOCS / "methods").glob("*.md"))
    for kind in ("router", "score", "experts", "shared", "memory", "controller", "split"):
        ours = {name for name in names(kind) if lookup(kind, name).__module__.startswith("moeify.")}
        assert not {name for name in ours if not re.search(rf"\b{name}\b", pages)}
