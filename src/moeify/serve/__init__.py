"""Inference: fast decoding on a CPU, and other settings of routers than in training. There is no server here."""

from moeify.serve.decode import fast_decode, plain_decode
from moeify.serve.settings import serve_with

__all__ = ["fast_decode", "plain_decode", "serve_with"]
