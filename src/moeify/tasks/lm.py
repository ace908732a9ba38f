"""The task `lm`: predict the next token of a text. Data are texts; the small model is a Llama that reads bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moeify.data.blocks import blocks
from moeify.data.corpus import Corpus, build_corpus
from moeify.data.packed import packed_parts
from moeify.data.text import read_texts
from moeify.data.tokenizer import ByteTokenizer
from moeify.evaluate.objective import NextToken, Samples
from moeify.tasks.base import Setup, Shape, Task
from moeify.tasks.models import load_dense, sample, save_tokenizer, saved_tokenizer

PROMPTS = ("def ", "The ", "import ")
"""What the trained models continue in the report, of text that came with Python and torch."""
_SAMPLES, _BEGINNING = 3, 16


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Task):
    """Rows of `length` tokens, cut from texts by domain.

    Attributes:
        text: the field of a row that is its text.
        packed: keep the documents of a row apart: tokens see their own document only, and positions count from its
            start.
    """

    name: ClassVar[str] = "lm"
    text: str = "text"
    packed: bool = False

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read the texts, and cut them into rows."""
        tokenizer: Any = ByteTokenizer() if model is None else saved_tokenizer(model)
        corpus = build_corpus() if data is None else read_texts(data, field=self.text)
        cut = packed_parts if self.packed else blocks
        train, validation = cut(corpus, tokenizer, self.length)
        facts = {"training tokens available": f"{train.length * len(train):,}"}
        if isinstance(corpus, Corpus):
            facts |= {"corpus": str(corpus).replace("\n", "; "), "corpus sha256": corpus.sha256}
        prompts = PROMPTS if data is None else _beginnings(validation, tokenizer)
        return Setup(
            train=train,
            validation=validation,
            objective=NextToken(),
            build=lambda: small_llama(self.shape, self.length) if model is None else load_causal(model),
            model=model or f"Llama from scratch {vars(self.shape)}",
            data=data or "text that came with Python and torch",
            facts=facts,
            save=lambda folder: save_tokenizer(tokenizer, folder),
            answers=lambda trained: [sample(trained, tokenizer, prompt) for prompt in prompts],
        )


def _beginnings(samples: Samples, tokenizer: Any) -> list[str]:
    """How some samples of own data begin, evenly spread over all of them, without special tokens."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    chosen = range(0, len(samples), max(1, len(samples) // _SAMPLES))[:_SAMPLES]
    starts = (samples[i]["input_ids"][:_BEGINNING].tolist() for i in chosen)
    return [text for ids in starts if (text := tokenizer.decode([token for token in ids if token not in special]))]


def load_causal(model: str) -> nn.Module:
    """A language model of transformers in fp32."""
    return load_dense(model, dtype=torch.float32)


def small_llama(shape: Shape, length: int) -> nn.Module:
    """A Llama from scratch that reads bytes, for texts of `length` bytes and more."""
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=shape.width, intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=max(512, 2 * length), tie_word_embeddings=True,
        bos_token_id=ByteTokenizer.eos_token_id, eos_token_id=ByteTokenizer.eos_token_id,
        pad_token_id=ByteTokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)
