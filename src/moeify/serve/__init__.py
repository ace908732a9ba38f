"""Run a model: decoding on a CPU. Serving itself is left to others."""

from moeify.serve.decode import fast_decode, plain_decode

__all__ = ["fast_decode", "plain_decode"]
