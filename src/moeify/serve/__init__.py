"""Inference: fast decoding on a CPU, and router settings that differ from those in training; not a server."""

from moeify.serve.decode import fast_decode, plain_decode
from moeify.serve.settings import serve_with

__all__ = ["fast_decode", "plain_decode", "serve_with"]
