"""MLX computes the same as the folders that are written for it."""

from __future__ import annotations

import json

import pytest

from export_models import router, sparse
from moeify import export
from moeify.routers import sigmoid
from moeify.sparsify.shared import gated

pytest.importorskip("mlx_lm")


@pytest.mark.parametrize(
    ("base", "recipe", "title"),
    [
        ("llama", "mixtral", "Mixtral"),
        ("llama", "olmoe", "Qwen2-MoE"),
        ("llama", router(normalize=False, shared=gated), "Qwen2-MoE"),
        ("qwen2", "olmoe", "Qwen2-MoE"),
        ("qwen3", "qwen3", "Qwen3-MoE"),
        ("qwen3", "deepseek", "Dots1"),
        ("llama", "deepseek", "GLM4-MoE"),
        ("deepseek_v3", "deepseek", "DeepSeek-V3"),
    ],
)
def test_mlx_gives_the_same_logits(base, recipe, title, tmp_path):
    done = export.write(sparse(base, recipe), tmp_path / "out", "mlx")
    assert done.notes[0].startswith(title)
    assert done.verification.difference < 1e-4


YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip


def test_mlx_has_deepseek_v2_with_yarn_only(tmp_path):
    done = export.write(sparse("deepseek_v3", "deepseek_v2", rope_parameters=YARN), tmp_path / "out", "mlx")
    assert done.notes == ["DeepSeek-V2 (DeepseekV2ForCausalLM)"]
    assert done.verification.difference < 1e-4
    assert "no class of mlx-lm" in export.find_exporter("mlx").supports(sparse("deepseek_v3", "deepseek_v2"))


@pytest.mark.parametrize(("base", "title"), [("llama", "GLM4-MoE"), ("deepseek_v3", "DeepSeek-V3")])
def test_classes_that_mlx_cannot_make_without_a_shared_expert_get_one_of_zeros(base, title, tmp_path):
    done = export.write(sparse(base, router(score=sigmoid, selection_bias=True)), tmp_path / "out", "mlx")
    assert done.notes[0].startswith(title)
    assert done.notes[1] == "a shared expert of 32 units is added"
    assert done.verification.difference < 1e-4


def test_a_base_of_positions_that_mlx_does_not_find_is_found_by_the_comparison(tmp_path):
    export.write(sparse(), tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["rope_theta"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="MLX gives other logits"):
        export.verify(tmp_path / "out")


def test_what_mlx_lacks_is_refused():
    assert "Mixtral, selection bias" in export.find_exporter("mlx").supports(sparse("llama", "matched"))
