"""`moeify plan` ranks the layouts of a model's folder, and writes the configuration of the best."""

from __future__ import annotations

import json

from command_line import moeify
from moeify import Recipe, save, sparsify
from tiny_models import gpt2, mixtral

CLUSTER = {
    "nodes": 1, "devices_per_node": 4, "device": "a100", "intra": {"bandwidth": 2e11, "latency": 1e-5},
}  # fmt: skip


def test_a_moe_of_transformers_is_planned_for_with_what_binds_it(tmp_path):
    mixtral().config.save_pretrained(tmp_path)
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER))
    ended = moeify(
        "plan", tmp_path, "--cluster", tmp_path / "cluster.json", "--length", 64, "--sequences", 8, "--skew", 1
    )
    assert ended.code == 0, ended.err
    for words in ("layouts fit", "best: ", "bound by ", "runner-up: ", "times the mean"):
        assert words in ended.out


def test_a_model_that_moeify_saved_gets_the_configuration_of_transformers(tmp_path):
    save(sparsify(gpt2(), Recipe(num_experts=4), verbose=False), tmp_path / "sparse")
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER))
    ended = moeify(
        "plan", tmp_path / "sparse", "--cluster", tmp_path / "cluster.json", "--length", 16, "--sequences", 8,
        "--emit", "transformers",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    values = json.loads(ended.out)["distributed_config"]
    assert values["fsdp_size"] * values["tp_size"] * values["dp_replicate_size"] * values["pp_size"] == 4


def test_a_program_without_a_configuration_is_refused(tmp_path):
    ended = moeify("plan", tmp_path, "--cluster", tmp_path / "c.json", "--emit", "deepspeed")
    assert ended.code == 2
    assert "only for transformers, torchtitan, megatron" in ended.err
