"""Training data: readers of text, tokens and blocks, the default corpus, and the files that claims are measured on."""

from moeify.data.blocks import Blocks, blocks
from moeify.data.packed import Packed, packed
from moeify.data.text import Texts, read_texts
from moeify.data.tokenizer import ByteTokenizer

__all__ = ["Blocks", "ByteTokenizer", "Packed", "Texts", "blocks", "packed", "read_texts"]
