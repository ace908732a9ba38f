"""Load models and tokenizers of transformers, keep a tokenizer beside a saved model, and sample text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from moeify.data.tokenizer import ByteTokenizer, Tokenizer
from moeify.engram import Engram
from moeify.files import read_json, write_json
from moeify.modes import in_evaluation
from moeify.store import load


def load_dense(model: str, architecture: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """A local or hub model of transformers; `options` are those of its `from_pretrained`.

    Raises:
        ValueError: transformers has no such class, or the model cannot be downloaded or read.
    """
    loader = getattr(transformers, architecture, None)
    if not hasattr(loader, "from_pretrained"):
        raise ValueError(f"transformers has no model class {architecture!r}")
    try:
        return loader.from_pretrained(model, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"no model {model!r} could be loaded: {_first_line(error)}") from None


def load_model(folder: Path, architecture: str | None = None) -> Any:
    """The model of a folder: one that `moeify.save` wrote, or one of transformers in the class that its config names.

    Args:
        folder: see above.
        architecture: another class of transformers.

    Raises:
        ValueError: it cannot be read.
    """
    config = folder / "config.json"
    if config.is_file() and "moeify" not in read_json(config):
        architecture = architecture or architecture_of(str(folder))
        return load_dense(str(folder), architecture, dtype="auto", local_files_only=True)
    return load(folder)


def architecture_of(model: str) -> str:
    """The class of transformers that the config of a local or hub model names, else `AutoModelForCausalLM`."""
    named = (getattr(load_dense(model, "AutoConfig"), "architectures", None) or [""])[0]
    return named if hasattr(transformers, named) else "AutoModelForCausalLM"


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a local or hub model.

    Raises:
        ValueError: there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model or tokenizer {model!r} could be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Put a tokenizer beside a model; of the byte tokenizer only its name."""
    if isinstance(tokenizer, ByteTokenizer):
        write_json(folder / "tokenizer.moeify.json", {"tokenizer": "bytes"})
    else:
        tokenizer.save_pretrained(folder)


def saved_tokenizer(model: str | Path) -> Any:
    """The tokenizer in the folder of a saved model, or of a hub model.

    Raises:
        ValueError: there is none.
    """
    return ByteTokenizer() if (Path(model) / "tokenizer.moeify.json").is_file() else load_tokenizer(str(model))


def sample(
    model: Any, tokenizer: Tokenizer, prompt: str, *, tokens: int = 120, temperature: float = 0.8, seed: int = 0
) -> str:
    """The prompt and what the model writes after it, without special tokens such as the beginning of a text.

    Raises:
        ValueError: a model that cannot generate, a prompt without tokens, or a temperature below 0.
    """
    if not hasattr(model, "generate"):
        raise ValueError(f"a {type(model).__name__} does not write text; moeify generate needs a causal language model")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    if temperature < 0:
        raise ValueError(
            f"a temperature of {temperature} is below 0; 0 takes the likeliest token, 1 samples as trained"
        )
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    prompt_ids = torch.tensor([ids], device=device)
    cached = not any(isinstance(part, Engram) for part in model.modules())  # which reads the ids of the whole text
    how = {"do_sample": True, "temperature": temperature, "top_k": 40} if temperature else {"do_sample": False}
    with in_evaluation(model), torch.no_grad():
        out = model.generate(
            input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=tokens,
            use_cache=cached,
            pad_token_id=getattr(tokenizer, "pad_token_id", None) or getattr(tokenizer, "eos_token_id", None), **how,
        )  # fmt: skip
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return str(tokenizer.decode([token for token in out[0].tolist() if token not in special]))
