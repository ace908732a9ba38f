"""`moeify verify` tells a saved model from a damaged one."""

from __future__ import annotations

import shutil

from command_line import moeify


def test_a_saved_model_is_what_was_saved_until_a_bit_flips(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained[0] / "model", folder)
    whole = moeify("verify", folder)
    assert (whole.code, whole.out) == (0, f"every file of {folder} is what was saved\n")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    damaged = moeify("verify", folder)
    assert damaged.code == 2
    assert "model.safetensors" in damaged.err


def test_a_run_is_verified_by_its_model(trained):
    assert moeify("verify", trained[0]).code == 0
