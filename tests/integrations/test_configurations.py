"""`moeify init`: what it prints is read by `moeify train`, and every key of the file is in it."""

from __future__ import annotations

import pytest
import yaml

from command_line import moeify
from moeify.integrations.configurations import translate

FILES = {
    "axolotl": """
base_model: ./llama
plugins: [moeify.integrations.axolotl.Moeify, axolotl.integrations.liger.LigerPlugin]
moe_recipe: mixtral
moe_balance: {balance: 0.02, scope: sequence}
moe_controller: {name: sign, rate: 0.001}
datasets:
  - {path: ./stories.jsonl, type: completion}
sequence_len: 256
micro_batch_size: 2
gradient_accumulation_steps: 4
max_steps: 100
num_epochs: 1
learning_rate: 2e-4
optimizer: adamw_torch_fused
lr_scheduler: constant
load_in_8bit: false
output_dir: ./out
""",
    "llamafactory": """
model_name_or_path: ./llama
stage: sft
do_train: true
finetuning_type: lora
dataset: identity
template: llama3
cutoff_len: 128
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
moe_aux_loss_coef: 0.001
output_dir: saves/llama
""",
    "trl": """
model_name_or_path: ./llama
dataset_name: trl-lib/stories
max_length: 128
per_device_train_batch_size: 4
max_steps: 50
seed: 3
packing: true
router_aux_loss_coef: 0.01
output_dir: out
""",
}
EXPECTED = {
    "axolotl": {
        "model": "./llama", "recipe": "mixtral", "balance": 0.02, "scope": "sequence",
        "controller": '{"name": "sign", "rate": 0.001}', "data": "./stories.jsonl", "length": 256, "batch": 8,
        "accumulate": 4, "steps": 100, "learning_rate": 2e-4, "output": "./out",
    },
    "llamafactory": {
        "model": "./llama", "length": 128, "batch": 8, "accumulate": 8, "learning_rate": 1e-4, "output": "saves/llama",
    },
    "trl": {
        "model": "./llama", "data": "trl-lib/stories", "length": 128, "batch": 4, "steps": 50, "seed": 3,
        "output": "out",
    },
}  # fmt: skip
CONVERTED = {
    "base_model", "model_name_or_path", "moe_recipe", "moe_balance", "moe_controller", "datasets", "dataset_name",
    "sequence_len", "cutoff_len", "max_length", "micro_batch_size", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_steps", "learning_rate", "output_dir", "seed",
}  # fmt: skip
LEFT_OUT = {
    "axolotl": {"plugins", "num_epochs", "lr_scheduler"},
    "llamafactory": {"finetuning_type", "dataset", "template", "moe_aux_loss_coef"},
    "trl": {"router_aux_loss_coef"},
}


@pytest.mark.parametrize("program", FILES)
def test_what_is_printed_is_read_by_train_and_means_the_same(tmp_path, program):
    (tmp_path / "theirs.yaml").write_text(FILES[program])
    printed = moeify("init", tmp_path / "theirs.yaml", "--from", program)
    assert printed.code == 0, printed.err
    assert yaml.safe_load(printed.out) == EXPECTED[program]
    (tmp_path / "job.yaml").write_text(printed.out)
    read = moeify("train", tmp_path / "job.yaml", "--print-config")
    assert read.code == 0, read.err
    own = yaml.safe_load(read.out)
    assert {name: own[name] for name in EXPECTED[program]} | {"output": EXPECTED[program]["output"]} == EXPECTED[
        program
    ]


@pytest.mark.parametrize("program", FILES)
def test_keys_without_an_equivalent_are_listed_with_the_reason(program):
    made = translate(program, yaml.safe_load(FILES[program]))
    assert made.left_out.keys() == LEFT_OUT[program]
    assert all(f"# {key}: {reason}" in str(made) and reason for key, reason in made.left_out.items())
    assert all(f" {key}" in str(made) for key in yaml.safe_load(FILES[program]).keys() - CONVERTED)
    assert "0.01 times k" in str(made) or program != "trl"


def test_no_key_is_dropped_silently():
    made = translate("axolotl", {"surprise": 3, "strict": False, "special_tokens": None})
    assert made.left_out == {"surprise": "moeify train has no option for it"}
    assert "# ask for nothing: strict, special_tokens" in str(made)


def test_data_that_moeify_cannot_read_is_said():
    two = [{"path": "a", "type": "completion"}, {"path": "b", "type": "completion"}]
    assert "put the files into a folder" in translate("axolotl", {"datasets": two}).left_out["datasets"]
    assert (
        "'alpaca' has a template"
        in translate("axolotl", {"datasets": [{"path": "a", "type": "alpaca"}]}).left_out["datasets"]
    )


def test_bad_files_and_programs_end_in_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: fast\n")
    assert "learning_rate: 'fast' cannot be read" in moeify("init", tmp_path / "a.yaml", "--from", "trl").err
    assert "did you mean 'axolotl'?" in moeify("init", tmp_path / "a.yaml", "--from", "axolotle").err
    (tmp_path / "b.yaml").write_text("- 1\n")
    assert "holds no keys and values" in moeify("init", tmp_path / "b.yaml", "--from", "trl").err
    assert "there is no file" in moeify("init", tmp_path / "c.yaml", "--from", "trl").err
    (tmp_path / "d.yaml").write_bytes(b"\xff")
    assert "d.yaml cannot be read" in moeify("init", tmp_path / "d.yaml", "--from", "trl").err
