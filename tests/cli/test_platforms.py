"""The command line on a system that is not the one it was written on: Windows, and a locale without UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

from command_line import TINY, moeify

STRICT = (
    "import warnings; warnings.filterwarnings('error', category=EncodingWarning, module='moeify'); "
    "from moeify.cli import main; main()"
)


class Windows(types.ModuleType):
    """`os` as it is there, as far as files are concerned: a folder cannot be opened."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)

    @staticmethod
    def open(path, *arguments):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, *arguments)


def test_a_run_ends_well_where_there_is_no_resource_and_folders_cannot_be_opened(tmp_path, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("moeify.files.os", Windows("os"))
    command = ["train", *TINY, "--steps", 2, "--data", text, "--output", tmp_path / "run"]
    ended = moeify(*command)
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["job"]["peak_memory_bytes"] is None
    assert "MiB" not in summary["facts"]["whole job"]
    assert moeify(*command, "--resume").code == 0
    assert moeify("generate", tmp_path / "run", "--tokens", 2).code == 0


def test_everything_is_utf8_whatever_the_locale_says(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    sentences = "\n".join(f"{i * i} déjà vu, été, naïve, “œuvre”, 東京" for i in range(400))
    (folder / "texte.txt").write_text(sentences, encoding="utf-8")
    recipe = '# für „alle“\nnum_experts = 4\n[router]\nname = "topk"\n'
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    locale = {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    options = [*TINY, "--steps", "2", "--data", folder, "--recipe", tmp_path / "recipe.toml"]
    command = [sys.executable, "-c", STRICT, "train", *options, "--output", tmp_path / "run"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, env=os.environ | locale)
    assert ended.returncode == 0, ended.stderr.decode()
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "</html>" in report
    assert (tmp_path / "run" / "summary.json").read_text(encoding="utf-8")
    assert b"everything is in" in ended.stdout
