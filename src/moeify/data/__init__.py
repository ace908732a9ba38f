"""Training data: readers of text, the default corpus, and the files that claims are measured on."""

from moeify.data.text import Blocks, ByteTokenizer, Texts, blocks, read_texts

__all__ = ["Blocks", "ByteTokenizer", "Texts", "blocks", "read_texts"]
