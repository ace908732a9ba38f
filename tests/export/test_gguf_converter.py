"""GGUF files have the tensors and keys that llama.cpp's own converter makes of the class of transformers.

The converter comes with auto-round, `pip install --no-deps auto-round`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

import moe_families
from export_models import encoder, router, shown, sparse
from moeify import export
from moeify.export import GgufFile, HfFolder
from moeify.sparsify.shared import dense, gated

gguf = pytest.importorskip("gguf")
OWN_SCALE = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 3.0,
    "embedding_multiplier": 1.5,
}
CASES = {
    "llama": (("llama", "mixtral"), "mixtral"),
    "qwen2moe": (("llama", router(normalize=False, shared=gated)), "qwen2_moe"),
    "qwen3moe": (("qwen3", "qwen3"), "qwen3_moe"),
    "olmoe": (None, "olmoe"),
    "granitemoe": (("granite", router(shared=dense)), "granitemoeshared"),
    "glm4moe": (("llama", "deepseek"), "glm4_moe"),
    "ernie4_5-moe": (("ernie4_5", "ernie"), "ernie4_5_moe"),
}
NOT_OF_THE_MODEL = (
    "general.", "tokenizer.", "GGUF.",
    "ernie4_5-moe.expert_shared_feed_forward_length",  # the converter writes intermediate_size / num_key_value_heads
)  # fmt: skip


class Known:
    """The architectures or tensors of the package gguf; those of a converter that is newer than it are None."""

    def __init__(self, members):
        self.members = members

    def __getattr__(self, name):
        return getattr(self.members, name, None)

    def __iter__(self):
        return iter(self.members)


@pytest.fixture(scope="module")
def converter():
    """The package `conversion` of llama.cpp inside auto-round, without the rest of auto-round."""
    if (found := importlib.util.find_spec("auto_round")) is None:
        pytest.skip("auto-round is not installed")
    (root,) = found.submodule_search_locations
    before, path = dict(sys.modules), sys.path[:]
    for name in ("auto_round", "auto_round.utils"):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [root if name == "auto_round" else f"{root}/utils"]
    sys.path.insert(0, f"{root}/export/export_to_gguf")
    try:
        with mock.patch.multiple(gguf, MODEL_ARCH=Known(gguf.MODEL_ARCH), MODEL_TENSOR=Known(gguf.MODEL_TENSOR)):
            yield importlib.import_module("conversion")
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - before.keys():
            if name.startswith(("auto_round", "conversion")):
                del sys.modules[name]


def converted(converter, folder, file):
    config = converter.ModelBase.load_hparams(folder, False)
    made = converter.get_model_class(config["architectures"][0])
    made.set_vocab = lambda self: None
    made(folder, gguf.LlamaFileType.ALL_F32, file).write()
    return gguf.GGUFReader(file)


def tensors_of(reader):
    """Type, the four sizes of ggml, and bytes of every tensor."""
    return {
        tensor.name: (tensor.tensor_type.name, *([*tensor.shape, 1, 1, 1])[:4], tensor.data.tobytes())
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("title", CASES)
def test_tensors_are_those_of_the_converter_bit_for_bit(title, converter, tmp_path):
    made, model_type = CASES[title]
    config = OWN_SCALE if title == "granitemoe" else {}
    model = sparse(*made, **config) if made else shown(moe_families.build(model_type))
    export.write(model, tmp_path / "hf", exporter=HfFolder(model_type))
    export.write(model, tmp_path / "gguf", "gguf", exporter=GgufFile("f32", title))
    theirs = converted(converter, tmp_path / "hf", tmp_path / "theirs.gguf")
    ours = gguf.GGUFReader(tmp_path / "gguf" / "model-f32.gguf")
    assert_the_same(ours, theirs)


def assert_the_same(ours, theirs):
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    unlike = {name: (a[name][:-1], b[name][:-1]) for name in a if a[name] != b[name]}
    assert not unlike
    for key, field in ours.fields.items():
        if not key.startswith(NOT_OF_THE_MODEL) and key in theirs.fields:
            assert field.contents() == theirs.fields[key].contents(), key


def nomic_folder(model, folder):
    """A sparse encoder under the names of Nomic's own class, NomicBertModel, which is not part of transformers."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("embeddings."):
            tensors[name.replace("embeddings.LayerNorm", "emb_ln")] = tensor
    for i, layer in enumerate(model.layers):
        attention, parts = layer.self_attn, {"norm1": layer.post_attention_layernorm, "norm2": layer.post_mlp_layernorm}
        parts |= {"attn.out_proj": attention.o_proj}
        for kind in ("weight", "bias"):
            joined = [getattr(getattr(attention, f"{part}_proj"), kind) for part in "qkv"]
            tensors[f"encoder.layers.{i}.attn.Wqkv.{kind}"] = torch.cat(joined)
        if i % 2:
            experts = layer.mlp.experts
            tensors |= {
                f"encoder.layers.{i}.mlp.router.layer.weight": layer.mlp.router.weight,
                f"encoder.layers.{i}.mlp.experts.mlp.w1": experts.up_proj.flatten(0, 1),
                f"encoder.layers.{i}.mlp.experts.mlp.w2": experts.down_proj.transpose(1, 2).flatten(0, 1),
                f"encoder.layers.{i}.mlp.experts.bias": torch.zeros(config.hidden_size),
            }
        else:
            parts |= {"mlp.fc1": layer.mlp.fc1, "mlp.fc2": layer.mlp.fc2}
        for name, part in parts.items():
            tensors |= {f"encoder.layers.{i}.{name}.{kind}": t for kind, t in part.named_parameters()}
    folder.mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    written = {
        "architectures": ["NomicBertModel"], "vocab_size": config.vocab_size, "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads, "n_layer": config.num_hidden_layers, "n_inner": config.intermediate_size,
        "layer_norm_epsilon": config.layer_norm_eps, "rotary_emb_base": config.rope_parameters["rope_theta"],
        "n_positions": 2048, "max_trained_positions": 2048, "activation_function": "gelu", "causal": False,
        "qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True, "prenorm": False, "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "num_experts": 4, "moe_top_k": 2,
        "moe_every_n_layers": 2, "type_vocab_size": config.type_vocab_size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    return folder


def test_an_encoder_is_that_of_the_converter_bit_for_bit(converter, tmp_path):
    model = encoder()
    export.write(model, tmp_path / "gguf", "gguf")
    theirs = converted(converter, nomic_folder(model, tmp_path / "hf"), tmp_path / "theirs.gguf")
    ours = gguf.GGUFReader(tmp_path / "gguf" / "model-f32.gguf")
    assert_the_same(ours, theirs)
