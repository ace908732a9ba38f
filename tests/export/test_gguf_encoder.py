"""Sparse encoders as llama.cpp's `nomic-bert-moe`."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from export_models import PLAIN, encoder
from moeify import export
from moeify.export import GgufFile
from moeify.find.where import every, ffn
from moeify.routers import TopK
from moeify.sparsify.make import fresh
from moeify.sparsify.shared import dense

gguf = pytest.importorskip("gguf")


def test_a_sparse_encoder_is_nomic_bert_moe(tmp_path):
    model = encoder()
    done = export.write(model, tmp_path / "out", "gguf")
    assert done.notes == ["nomic-bert-moe, f32, no tokenizer"]
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf")
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == sum(p.numel() for p in model.parameters())
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    attention, experts = model.layers[3].self_attn, model.layers[3].mlp.experts
    together = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(tensors["blk.3.attn_qkv.weight"], together)
    assert torch.equal(tensors["blk.3.ffn_up_exps.weight"], experts.up_proj)
    if find_spec("llama_cpp"):
        assert done.verification.difference < 3e-3


def test_routers_and_types_of_tokens_stay_in_fp32_and_a_scale_goes_into_the_experts(tmp_path):
    model = encoder(router=partial(TopK, k=2, normalize=False, scale=2.0))
    done = export.write(model, tmp_path / "out", "gguf", exporter=GgufFile("q8_0"))
    assert "the scale of the weights, 2, is multiplied into the experts" in done.notes
    tensors = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").tensors
    exact = [tensor.name for tensor in tensors if tensor.tensor_type.name == "F32" and len(tensor.shape) > 1]
    assert sorted(exact) == ["blk.1.ffn_gate_inp.weight", "blk.3.ffn_gate_inp.weight", "token_types.weight"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"router": partial(TopK, k=2)}, "normalize: always False, in the model True"),
        ({"experts": fresh}, "its experts have biases; make them without, as by partial(fresh, bias=False)"),
        ({"experts": partial(PLAIN, granularity=2)}, "as wide as its dense networks, 64, the model's 32"),
        ({"act": "gelu"}, "its experts compute GELU in the form with tanh"),
        ({"where": ffn}, "its sparse layers are the second and others at equal intervals (odd), of the model (0, 1"),
        ({"where": every(3)}, "of the model (2,)"),
        ({"shared": dense}, "its sparse layers have more than experts"),
    ],
)
def test_what_nomic_bert_moe_does_not_compute_is_refused(changes, reason):
    assert reason in export.find_exporter("gguf").supports(encoder(**changes))
