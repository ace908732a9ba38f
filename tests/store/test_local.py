"""A folder is loaded without a network, whatever its config asks for."""

from __future__ import annotations

import json
import socket

import huggingface_hub
import pytest
import torch

from moeify import Recipe, load, save
from moeify.files import write_json
from moeify.sparsify import sparsify
from moeify.store.config import unfold
from tiny_models import causal_lm, inputs


class Reached(BaseException):
    """Something tried to leave the machine; no `except Exception` hides it."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def reach(*args, **kwargs):
        raise Reached(args)

    monkeypatch.setattr(socket.socket, "connect", reach)
    monkeypatch.setattr(socket, "getaddrinfo", reach)
    for name in ("hf_hub_download", "snapshot_download", "repo_exists", "file_exists", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, reach)
        monkeypatch.setattr(huggingface_hub.HfApi, name, reach)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", reach)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", reach)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False).eval()
    folder = tmp_path_factory.mktemp("saved")
    save(model, folder)
    return folder, unfold(json.loads((folder / "config.json").read_text())), inputs(model), model


def edited(saved, folder, config: dict, architecture: str | None = None):
    source, description, *_ = saved
    described = description["model"]
    model = {**described, "config": {**described["config"], **config}, "class": architecture or described["class"]}
    for file in source.glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    write_json(folder / "config.json", {**description, "model": model})
    return folder


NEUTRAL = [
    {"attn_implementation": "someone/attention"},
    {"_attn_implementation": "kernels-community/flash-attn"},
    {"attn_implementation": {"": "someone/attention"}},
    {"_attn_implementation_internal": "flash_attention_2"},
    {"experts_implementation": "someone/experts"},
    {"use_pretrained_backbone": True},
    {"part_config": {"use_pretrained_backbone": True, "_attn_implementation": "someone/attention"}},
]


@pytest.mark.parametrize("config", NEUTRAL)
def test_what_weights_of_the_folder_make_needless_is_left_out_and_said(saved, tmp_path, config, caplog):
    *_, given, model = saved
    loaded = load(edited(saved, tmp_path, config))
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert f"config.json: left out {next(iter(config.get('part_config', config)))}=" in caplog.text


def test_a_folder_as_it_was_saved_is_loaded_whole(saved, caplog):
    load(saved[0])
    assert "left out" not in caplog.text


AWAY = {
    "DetrForObjectDetection": {"backbone": "someone/backbone", "use_timm_backbone": False},
    "DepthAnythingForDepthEstimation": {"backbone": "someone/backbone", "use_pretrained_backbone": True},
    "TimmBackbone": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/backbone"},
    "TimmWrapperModel": {"model_type": "timm_wrapper", "architecture": "hf_hub:someone/backbone"},
    "DPTForDepthEstimation": {"neck": {"backbone": "someone/backbone"}},
}


@pytest.mark.parametrize("architecture", AWAY)
def test_a_backbone_of_the_hub_is_refused_with_the_way_out(saved, tmp_path, architecture):
    folder = edited(saved, tmp_path, AWAY[architecture], f"transformers.{architecture}")
    with pytest.raises(ValueError, match=r"config.json names the backbone '.*someone/backbone'.*load\(folder, model="):
        load(folder)
