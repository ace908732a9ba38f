"""`moeify generate` continues a prompt with a saved model."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from command_line import moeify
from moeify.tasks.models import load_dense, load_tokenizer, sample


@pytest.fixture
def run(trained):
    return trained[0]


def test_a_run_and_its_model_write_the_same(run):
    one, other = (moeify("generate", folder, "--tokens", 20) for folder in (run, run / "model"))
    assert one.code == other.code == 0
    assert one.out == other.out
    assert one.out.startswith("def ")


def test_the_prompt_is_continued_by_as_many_tokens_as_asked(run):
    ended = moeify("generate", run, "--prompt", "in list", "--tokens", 3, "--temperature", 0)
    assert ended.out.startswith("in list")
    assert len(ended.out.removesuffix("\n")) <= len("in list") + 3


def test_special_tokens_are_not_printed(llama):
    tokenizer = load_tokenizer(str(llama))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    model = load_dense(str(llama))
    model.resize_token_embeddings(len(tokenizer))
    assert tokenizer.decode(tokenizer.encode("in list")).startswith("<s>")
    assert sample(model, tokenizer, "in list", tokens=3).startswith("in list")


def test_a_seed_decides_what_is_sampled_and_temperature_0_needs_none(run):
    def write(*options):
        return moeify("generate", run, "--tokens", 30, *options).out

    assert write("--seed", 1) == write("--seed", 1)
    assert len({write("--seed", seed) for seed in range(4)}) > 1
    assert write("--temperature", 0, "--seed", 1) == write("--temperature", 0, "--seed", 2)
