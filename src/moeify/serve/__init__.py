"""Inference: fast decoding on a CPU. There is no server here."""

from moeify.serve.decode import fast_decode, plain_decode

__all__ = ["fast_decode", "plain_decode"]
