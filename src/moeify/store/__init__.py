"""Sparse models on disk: safetensors and a `config.json` that holds the recipe. Nothing is ever unpickled."""

from moeify.store.hashes import verify
from moeify.store.load import load
from moeify.store.peft import has_adapters
from moeify.store.save import save
from moeify.store.weights import load_weights

__all__ = ["has_adapters", "load", "load_weights", "save", "verify"]
