"""llama.cpp computes every architecture at 256 positions of one text as the model does.

It runs where llama-cpp-python is installed, which docs/guide/anywhere.md says how to compile.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_families
from export_models import GGUF_CASES, encoder, shown, sparse
from moeify import export, sparsify
from moeify.data.claim_files import data_file
from moeify.export.probe import logits_of
from moeify.sparsify import recipes

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
POSITIONS = 256
TEXT = "Once upon a time, there was a little girl who lived near the sea with a big dog and a small red boat. "


def in_llama_cpp(folder, ids):
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    (file,) = folder.glob("*.gguf")
    model = llama_cpp.Llama(str(file), n_ctx=POSITIONS, n_batch=POSITIONS, logits_all=True, verbose=False, **exact)
    model.eval(ids[0].tolist())
    logits = torch.tensor(model.scores[:POSITIONS])
    model.close()
    return logits[None]


def assert_same(model, ids, folder, title):
    done = export.write(model, folder, "gguf")
    assert done.notes[0].startswith(f"{title}, f32")
    theirs, ours = in_llama_cpp(folder, ids), logits_of(model, ids)
    assert ids.shape[1] == POSITIONS
    assert (theirs - ours).abs().max() < 1e-3
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


@pytest.mark.parametrize(("base", "recipe", "config", "title"), GGUF_CASES)
def test_logits_are_the_models(base, recipe, config, title, tmp_path):
    model = sparse(base, recipe, max_position_embeddings=2 * POSITIONS, **config)
    ids = torch.randint(model.config.vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(3))
    assert_same(model, ids, tmp_path / "out", title)


def test_logits_of_olmoe_are_the_models(tmp_path):
    model = shown(moe_families.build("olmoe", max_position_embeddings=2 * POSITIONS))
    ids = torch.randint(model.config.vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(3))
    assert_same(model, ids, tmp_path / "out", "olmoe")


def test_hidden_states_of_an_encoder_are_the_models(tmp_path):
    model = encoder()
    assert export.write(model, tmp_path / "out", "gguf").notes == ["nomic-bert-moe, f32, no tokenizer"]
    exact = {"n_ctx": POSITIONS, "n_batch": POSITIONS, "n_ubatch": POSITIONS, "flash_attn": False}
    options = {"embedding": True, "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_NONE, "verbose": False}
    read = llama_cpp.Llama(str(tmp_path / "out" / "model-f32.gguf"), **exact, **options)
    ids = torch.randint(3, model.config.vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(3))
    tokens = (llama_cpp.llama_token * POSITIONS)(*ids[0].tolist())
    assert llama_cpp.llama_encode(read.ctx, llama_cpp.llama_batch_get_one(tokens, POSITIONS)) == 0
    found = llama_cpp.llama_get_embeddings(read.ctx)
    theirs = torch.tensor([found[i] for i in range(POSITIONS * read.n_embd())]).view(1, POSITIONS, -1)
    read.close()
    ours = logits_of(model, ids)
    assert (theirs - ours).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.parametrize(("recipe", "title"), [("mixtral", "llama"), ("deepseek", "glm4moe"), ("olmoe", "qwen2moe")])
def test_logits_of_a_trained_model_on_a_text_are_the_models(recipe, title, tmp_path):
    try:
        names = ("config.json", "model.safetensors", "tokenizer.json")
        folder, *_ = (data_file(f"stories260k/hf/{name}").parent for name in names)
    except FileNotFoundError:
        pytest.skip("needs the data folder that MOEIFY_DATA names")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sparsify(AutoModelForCausalLM.from_pretrained(folder), recipes[recipe], verbose=False).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "router" in name or "experts" in name:  # which are equal copies before
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.tensor([tokenizer(TEXT * 20).input_ids[:POSITIONS]])
    assert_same(model, ids, tmp_path / "out", title)
