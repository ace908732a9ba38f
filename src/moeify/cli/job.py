"""The job of `train` and `compare`: train a sparse model and its dense baseline on the same text, and write results."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from moeify.cli import threads
from moeify.cli.text import load_dense, load_tokenizer, sample, save_tokenizer
from moeify.data.blocks import blocks
from moeify.data.corpus import build_corpus
from moeify.data.text import read_texts
from moeify.data.tokenizer import ByteTokenizer, Tokenizer
from moeify.evaluate.run import Settings, Stopped
from moeify.evaluate.versus import Versus, versus
from moeify.files import read_json, write_json, write_text
from moeify.folders import RUN_LOCK, locked
from moeify.inspect.load import ExpertLoad, expert_load
from moeify.inspect.page import comparison_rows, load_rows, says, size_rows, write_report
from moeify.inspect.pictures import draw_load, draw_losses
from moeify.sparsify import Recipe
from moeify.store import save
from moeify.version import __version__

PROMPTS = ("def ", "The ", "import ")


@dataclass(frozen=True)
class Shape:
    """The small Llama that is trained when no model is named.

    Attributes:
        width: D.
        layers: decoder layers.
        heads: attention heads.
        hidden: hidden width of the dense FFN.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 512


@dataclass(frozen=True)
class Job:
    """The settings of a comparison.

    Attributes:
        output: the run's folder.
        recipe: how the dense model is made sparse.
        settings: how long and how fast both are trained.
        model: a local or hub model of transformers to start from; None for a small Llama from scratch.
        data: a file, folder or hub data set; None for the text that came with Python and torch.
        length: tokens per block.
        shape: sizes of the small Llama.
        seeds: number of pairs of runs.
        resume: continue where a stopped call ended.
    """

    output: Path
    recipe: Recipe
    settings: Settings
    model: str | None = None
    data: str | None = None
    length: int = 128
    shape: Shape = field(default_factory=Shape)
    seeds: int = 1
    resume: bool = False

    def run(self) -> Versus:
        """Train, compare, and leave checkpoint, metrics, pictures, samples and report in the run's folder.

        Raises:
            ValueError: the folder holds another run; or data, model or recipe are invalid.
            KeyboardInterrupt: a signal ended it; `resume` continues it.
        """
        try:
            self._make_folder()
            with locked(self.output, RUN_LOCK, "is running"):
                return self._run()
        except (Stopped, KeyboardInterrupt) as stop:
            message = f"{str(stop) or 'interrupted'}; go on with the same command and --resume"
            raise KeyboardInterrupt(message) from None

    def _run(self) -> Versus:
        started = time.perf_counter()
        console = Console(soft_wrap=True, markup=False, highlight=False)
        self._begin()
        console.print(threads.describe())
        tokenizer = ByteTokenizer() if self.model is None else load_tokenizer(self.model)
        corpus = build_corpus() if self.data is None else read_texts(self.data)
        console.print(str(corpus) if self.data is None else f"data: {self.data}")
        train, validation = blocks(corpus, tokenizer, self.length)
        models: dict[str, nn.Module] = {}
        result = versus(
            self.builder(tokenizer), self.recipe, train, validation, self.output, self.settings,
            seeds=self.seeds, resume=self.resume, log=console.print, on_model=models.__setitem__,
        )  # fmt: skip
        notes = {
            "Data": self.data or "text that came with Python and torch",
            "Balance": self.settings.sparse.describe(),
        }
        save(models["sparse"], self.output / "model", notes=notes)
        save_tokenizer(tokenizer, self.output / "model")
        load = expert_load(models["sparse"], validation)
        samples = {name: [sample(model, tokenizer, prompt) for prompt in PROMPTS] for name, model in models.items()}
        facts = self._facts(getattr(corpus, "sha256", None), train.length * len(train), result.steps)
        cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory()}
        memory = cost["peak_memory_bytes"]
        facts["whole job"] = f"{cost['seconds']:,.0f} s" + (
            "" if memory is None else f", at most {memory / 2**20:,.0f} MiB of memory"
        )
        self._write(result, load, samples, facts, cost)
        self._show(console, result, load, samples)
        return result

    def _make_folder(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output} is a file; name a folder for the run")
        self.output.mkdir(parents=True, exist_ok=True)
        if not os.access(self.output, os.W_OK):
            raise ValueError(f"{self.output} cannot be written to; name another --output")

    def _begin(self) -> None:
        """Record the job in its folder, or check that the folder holds an earlier start of the same job."""
        output, begun = self.output, self.output / "job.json"
        used = any(path not in (begun, output / RUN_LOCK) for path in output.iterdir())
        if used and not self.resume:
            raise ValueError(f"{output} is not empty; pass --resume to go on with it, or another --output")
        ours = json.loads(json.dumps(self._decisive(), default=repr))
        theirs = read_json(begun) if used and begun.is_file() else ours
        others = [
            f"{name} {theirs.get(name)!r} instead of {value!r}"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if others:
            raise ValueError(
                f"{output} was begun with {', '.join(others)}; go on with its own options, or in another --output"
            )
        if not (used and begun.is_file()):
            write_json(begun, ours)

    def _decisive(self) -> dict[str, Any]:
        """The settings that determine the results, by name; a resumed job must have the same."""
        settings = {
            name: value for name, value in vars(self.settings).items() if name not in ("sparse", "device", "pairs")
        }
        balance = {name: value for name, value in vars(self.settings.sparse).items() if name != "progress"}
        job = {"model": self.model, "data": self.data, "length": self.length, "recipe": self.recipe.to_dict()}
        return job | asdict(self.shape) | settings | balance

    def builder(self, tokenizer: Tokenizer) -> Callable[[], nn.Module]:
        """The function that makes the dense model: the named one, or the small Llama."""
        if self.model is not None:
            name = self.model
            return lambda: load_dense(name, dtype=torch.float32)
        size = self.shape
        config = transformers.LlamaConfig(
            vocab_size=ByteTokenizer.vocab_size, hidden_size=size.width, intermediate_size=size.hidden,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
            max_position_embeddings=max(512, 2 * self.length), tie_word_embeddings=True,
            bos_token_id=ByteTokenizer.eos_token_id, eos_token_id=ByteTokenizer.eos_token_id,
            pad_token_id=ByteTokenizer.pad_token_id,
        )  # fmt: skip
        return lambda: transformers.LlamaForCausalLM(config)

    def _facts(self, corpus_hash: str | None, tokens: int, steps: int) -> dict[str, Any]:
        model = self.model or f"Llama from scratch {vars(self.shape)}"
        return {
            "model": model,
            "data": self.data or "text that came with Python and torch",
            "training tokens available": f"{tokens:,}",
            **({"corpus sha256": corpus_hash} if corpus_hash else {}),
            "steps": steps,
            "tokens per step": self.settings.batch * self.length,
            "learning rate": self.settings.learning_rate,
            "balance": self.settings.sparse.describe(),
            "seeds": self.seeds,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "moeify": __version__,
            "threads": torch.get_num_threads(),
        }

    def _write(
        self,
        result: Versus,
        load: ExpertLoad,
        samples: dict[str, list[str]],
        facts: dict[str, Any],
        cost: dict[str, float | None],
    ) -> None:
        summary = {"facts": facts, "job": cost, **result.to_dict(), "experts": load.to_dict(), "samples": samples}
        write_json(self.output / "summary.json", summary)
        metrics = self.output / f"sparse-{self.settings.seed}" / "metrics.jsonl"
        write_text(self.output / "metrics.jsonl", metrics.read_text(encoding="utf-8"))
        drawn = [
            draw_picture(self.output / "loss.png", draw_losses, result),
            draw_picture(self.output / "experts.png", draw_load, load),
        ]
        pictures = [file for file in drawn if file is not None]
        write_report(self.output / "report.html", result, load, pictures, samples, facts)

    def _show(self, console: Console, result: Versus, load: ExpertLoad, samples: dict[str, list[str]]) -> None:
        for name, texts in samples.items():
            console.rule(f"the {name} model writes")
            console.print("\n---\n".join(texts))
        for title, (heading, rows) in (
            ("size and speed", size_rows(result)),
            ("experts", load_rows(load)),
            ("validation loss, nats per token (lower is better)", comparison_rows(result)),
        ):
            shown = Table(*heading, title=title, title_justify="left")
            for row in rows:
                shown.add_row(*row)
            console.print(shown)
        for line in says(result, load):
            console.print(line)
        console.print(f"everything is in {self.output}; open {self.output / 'report.html'}")


def draw_picture(file: Path, draw: Callable[[Any, Path], None], facts: Any) -> Path | None:
    """Draw a picture into a file and return it; None if it cannot be drawn, which does not end the run."""
    try:
        draw(facts, file)
    except Exception as error:  # no error of fonts or domain names may lose a long training
        print(f"moeify: {file.name} could not be drawn: {error}")
        return None
    return file


def peak_memory() -> int | None:
    """Bytes of main memory that the process has held at most, None where the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
