"""The command line on a system that is not the one it was written on: Windows, and a locale without UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cli.test_plan import CLUSTER
from command_line import TINY, save_llama
from moeify.cli import app
from moeify.parallel import measure

WINDOWS = Path(__file__).parent.parent / "windows.py"
LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNDEFAULTENCODING": "1"}
TEXT = "\n".join(f"{i * i} déjà vu, été, naïve, “œuvre”, 東京" for i in range(400))
RECIPE = '# für „alle“\nnum_experts = 4\n[router]\nname = "topk"\n'
AXOLOTL = "# für „alle“\nbase_model: llama\nlearning_rate: 1e-4\n"


def commands(folder: Path) -> list[list[str]]:
    """Every command once, on what the ones before it wrote."""
    train = ["train", *TINY, "--steps", 2, "--data", folder / "data", "--recipe", folder / "recipe.toml"]
    train += ["--output", folder / "run"]
    read = ["--data", folder / "data", "--tokens", 64]
    found = [
        train,
        [*train, "--resume"],
        ["compare", *train[1:-1], folder / "seeds", "--seeds", 2],
        ["sparsify", folder / "llama", folder / "sparse", "--recipe", folder / "recipe.toml"],
        ["generate", folder / "run", "--tokens", 2],
        ["verify", folder / "sparse"],
        ["export", folder / "run", "--to", "gguf", "--output", folder / "exported"],
        ["inspect", folder / "run", "--data", folder / "data", "--output", folder / "inspect.html"],
        ["recipes"],
        ["recipes", "mixtral"],
        ["doctor"],
        ["doctor", "--model", folder / "run", *read],
        ["watch", folder / "run"],
        ["trace", folder / "run", *read, "--output", folder / "trace.jsonl"],
        ["plan", folder / "sparse", "--cluster", folder / "cluster.json", "--length", 16, "--sequences", 8],
        ["init", folder / "axolotl.yaml", "--from", "axolotl"],
        ["reproduce"],
    ]
    return [list(map(str, command)) for command in found]


def test_every_command_ends_well_on_windows_and_in_a_locale_without_utf8(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "texte.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "axolotl.yaml").write_text(AXOLOTL, encoding="utf-8")
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER))
    save_llama(tmp_path / "llama")
    given = commands(tmp_path)
    assert {command.name for command in app.registered_commands} == {command[0] for command in given}
    (tmp_path / "commands.json").write_text(json.dumps(given), encoding="utf-8")
    environment = os.environ | LOCALE | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, WINDOWS, tmp_path / "commands.json"], capture_output=True, env=environment, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert b"everything is in" in ended.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["job"]["peak_memory_bytes"] is None
    assert "MiB" not in summary["facts"]["whole job"]
    for report in (tmp_path / "run" / "report.html", tmp_path / "inspect.html"):
        assert "</html>" in report.read_text(encoding="utf-8")


def test_a_machine_is_measured_where_the_system_has_no_sysconf(monkeypatch):
    monkeypatch.delattr("os.sysconf")
    assert measure("cpu", size=64).device.memory > 2**30
