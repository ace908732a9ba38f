"""Sparse models on disk: safetensors and a `config.json` that holds the recipe. Nothing is ever unpickled."""

from moeify.store.store import load, load_weights, save

__all__ = ["load", "load_weights", "save"]
