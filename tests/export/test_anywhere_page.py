"""The page "From a dense model to any program" is run from top to bottom, with the tools that are installed."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest

from command_line import moeify, write_text
from moeify.data.claim_files import data_file
from tiny_models import causal_lm

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "anywhere.md"
FILES = ("tasks/stories.jsonl", "tasks/stories.yaml", "data/stories.jsonl")
STORY = "Once upon a time, there was a little girl. One day, a boy went to the park with a dog. They played.\n"
NEEDS = {"gguf": "gguf", "mlx": "mlx_lm", "onnx": "onnxruntime", "openvino": "openvino"}
PORT = "8000"


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def lacks(module: str) -> bool:
    return find_spec(module) is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tasks", "data"):
        (tmp_path / name).mkdir()
    write_text(tmp_path / "stories.txt", lines=300)
    dense(tmp_path / "stories260k")
    return tmp_path


def dense(folder: Path) -> None:
    """The model of the page if the data folder is there, else a Llama with random weights and merges of bytes."""
    try:
        names = (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        )
        files = [data_file(f"stories260k/hf/{name}") for name in names]
    except FileNotFoundError:
        pass
    else:
        folder.mkdir()
        for file in files:
            (folder / file.name).write_bytes(file.read_bytes())
        return
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    words = ByteLevelBPETokenizer()
    words.train_from_iterator([STORY], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, **special).save_pretrained(folder)
    causal_lm("llama", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)


def test_the_page_runs_from_top_to_bottom(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    servers: list[subprocess.Popen[bytes]] = []
    files = iter(FILES)
    try:
        for kind, text in blocks():
            text = text.replace(PORT, port)
            if kind in ("json", "yaml"):
                (folder / next(files)).write_text(text)
            elif kind == "python" and not any(lacks(name) for name in imports(text)) and (servers or port not in text):
                exec(compile(text, f"{PAGE.name}: {text.splitlines()[0]}", "exec"), {"__name__": "__main__"})
            elif kind == "bash":
                for command in commands(text):
                    servers += [run(command, port)] if command[:2] == ["transformers", "serve"] else run_to_end(command)
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    assert (folder / "runs" / "mixtral" / "model.safetensors").exists()


def imports(text: str) -> set[str]:
    return set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))


def commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        command = shlex.split(line, comments=True)
        if "pip" not in command and not needs_more(command):
            yield command


def needs_more(command: list[str]) -> bool:
    to = command[command.index("--to") + 1] if "--to" in command else ""
    of_command = {
        "lm_eval": ["lm_eval"],
        "transformers": ["openai", "fastapi", "uvicorn"],
        "mlx_lm.generate": ["mlx_lm"],
        "trl": ["trl"],
    }
    return any(map(lacks, [*of_command.get(command[0], []), *([NEEDS[to]] if to else [])]))


def run_to_end(command: list[str]) -> list[subprocess.Popen[bytes]]:
    if command[0] == "moeify":
        smaller = [
            "--steps",
            "2",
            "--length",
            "16",
            "--batch",
            "4",
            "--device",
            "cpu",
            "--evaluations",
            "1",
            "--no-progress",
        ]
        ended = moeify(*command[1:], *(smaller if command[1] == "train" else []))
        assert ended.code == 0, ended.err
        return []
    done = subprocess.run(program(command), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return []


def run(command: list[str], port: str) -> subprocess.Popen[bytes]:
    server = subprocess.Popen([*program(command), "--device", "cpu"], env=environment(), stdout=subprocess.DEVNULL)
    while not is_up(port):
        assert server.poll() is None
        time.sleep(0.5)
    return server


def program(command: list[str]) -> list[str]:
    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return own | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path("hf").absolute()), "OMP_NUM_THREADS": "1"}


def is_up(port: str) -> bool:
    try:
        return urlopen(f"http://127.0.0.1:{port}/health").status == 200
    except OSError:
        return False
