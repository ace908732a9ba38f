"""The command line, called in this process on everything tiny."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from moeify.cli import main
from ranks import PRELOAD
from tiny_models import causal_lm

_SIZES = {"steps": 4, "width": 16, "heads": 2, "layers": 2, "hidden": 32, "length": 32, "batch": 4, "evaluations": 2}
TINY = [*(part for name, size in _SIZES.items() for part in (f"--{name}", str(size))), "--device", "cpu"]
WORDS = ["def", "return", "import", "class", "self", "value", "number", "the", "of", "and", "to", "in", "list", "map"]


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


def moeify(*arguments: object) -> Ended:
    """Run a command as the shell would, but for the process; an exception that it lets through fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch("sys.argv", ["moeify", *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def moeify_apart(errors: Path, *arguments: object) -> BaseProcess:
    """Start a command in a process group of its own, forked off a server that has imported everything heavy."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    process = server.Process(target=_become, args=(errors, ["moeify", *map(str, arguments)]))
    process.start()
    return process


def _become(errors: Path, command: list[str]) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    sys.argv = command
    main()


def write_text(file: Path, lines: int = 120) -> Path:
    """A file of random sentences of few words, the same on every call."""
    words = random.Random(0)
    file.write_text("\n".join(" ".join(words.choices(WORDS, k=10)) for _ in range(lines)))
    return file


def save_llama(folder: Path) -> Path:
    """A tiny Llama of transformers with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    causal_lm("llama", vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder
