"""A pytest plugin for machines without a network: tiny models with random weights stand in for those of the hub.

What else is asked of the hub is refused at once, and not tried again.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

_HOME = tempfile.mkdtemp()
os.environ["HF_HOME"] = _HOME  # before huggingface_hub reads it
os.environ.pop("HF_HUB_CACHE", None)

import torch  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub import set_client_factory  # noqa: E402
from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: E402

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT = _SMALL | {"vocab_size": 1024, "intermediate_size": 32, "max_position_embeddings": 256, "bos_token_id": 1}
_IDS = {"pad_token_id": 0, "eos_token_id": 2}
_GPT2 = {"vocab_size": 1024, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, **_IDS, "bos_token_id": 1}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOss", _TEXT | _IDS | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4", _TEXT | _IDS | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 32},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", _TEXT | _IDS),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", _TEXT | _IDS),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2", _GPT2),
}  # fmt: skip


def _store(name: str, family: str, settings: dict[str, Any]) -> None:
    """Write a model into the cache as if it had been downloaded."""
    kind = f"{family}TextConfig" if family == "Llama4" else f"{family}Config"
    head = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    folder = Path(_HOME, "hub", f"models--{name.replace('/', '--')}")
    getattr(transformers, head)(getattr(transformers, kind)(**settings)).save_pretrained(folder / "snapshots" / "0")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0", encoding="utf-8")


class _Refusal:
    def __getattr__(self, name: str) -> Any:
        raise OfflineModeIsEnabled("this suite runs offline")

    def close(self) -> None:
        pass


set_client_factory(_Refusal)  # type: ignore[arg-type]
for _name, _model in _MODELS.items():
    _store(_name, *_model)
