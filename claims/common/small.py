"""A small byte-level Llama and the text that came with Python and torch, for claims that need no other data."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from moeify.data import ByteTokenizer, blocks
from moeify.data.corpus import build_corpus

LENGTH, BATCH, WIDTH, HIDDEN = 128, 8, 64, 128


def text() -> tuple[Tensor, Tensor]:
    """Blocks of token ids to learn from and 192 that are held out, each (blocks, LENGTH), of all domains alike."""
    learnt, held = blocks(build_corpus(300_000), ByteTokenizer(), LENGTH)
    dice = torch.Generator().manual_seed(0)
    return learnt.input_ids.long(), held.input_ids[torch.randperm(len(held), generator=dice)[:192]].long()


def llama(hidden: int = HIDDEN) -> nn.Module:
    """Two layers of width 64, from scratch."""
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=WIDTH, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)
