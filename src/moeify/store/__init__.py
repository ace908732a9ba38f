"""Sparse models on disk: safetensors and a `config.json` that holds the recipe. Nothing is ever unpickled."""

from moeify.store.peft import has_adapters
from moeify.store.store import load, load_weights, save

__all__ = ["has_adapters", "load", "load_weights", "save"]
