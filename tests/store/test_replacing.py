"""A model that is saved over another one: the folder holds either, and nobody else's files are touched."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from damage import damaged
from killing import forks, killed_at_every_operation
from moeify import Recipe, load, save
from moeify.files import write_json
from moeify.folders import SAVE_LOCK, locked
from moeify.routers import TopK
from moeify.sparsify import fresh, sparsify
from moeify.store import verify
from plain_models import blocks, output

ONE = torch.randn(2, 5, 8)
K2, K3 = (Recipe(num_experts=3, experts=fresh, router=partial(TopK, k=k)) for k in (2, 3))


def plain(seed: int, recipe: Recipe = K2) -> nn.Module:
    torch.manual_seed(seed)
    return sparsify(nn.Sequential(*blocks(1)), recipe, verbose=False).eval()


def computes(folder) -> torch.Tensor:
    return output(load(folder, model=nn.Sequential(*blocks(1))), (ONE,))


@forks
def test_a_kill_at_any_file_operation_leaves_the_old_model_or_the_new_one(tmp_path):
    old, new = plain(0), plain(1, K3)  # of equal shapes
    save(old, tmp_path / "start", max_shard_size="1KB")
    seen = []
    for folder, done in killed_at_every_operation(
        lambda folder: save(new, folder), tmp_path / "start", tmp_path, step=4
    ):
        found = computes(folder)
        verify(folder)
        seen.append(torch.equal(found, output(new, (ONE,))))
        assert seen[-1] or torch.equal(found, output(old, (ONE,)))
        assert seen[-1] or not done
        assert not list(folder.glob(".moeify-commit"))
    assert not seen[0]


def test_damage_to_any_file_is_refused(tmp_path):
    for seed, name in enumerate(("one", "two")):
        save(plain(seed), tmp_path / name, max_shard_size="1KB")
    folder, expected = tmp_path / "one", computes(tmp_path / "one")
    for name, what in damaged(folder, tmp_path / "two"):
        try:
            found = computes(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), (name, what)  # noqa: PT017 (it may also load)
            with pytest.raises((ValueError, OSError)):
                verify(folder)
        else:
            assert (what, name) == ("deleted", "SHA256.json")
            assert torch.equal(found, expected)


def test_files_of_earlier_versions_have_no_hashes_and_damage_is_refused_in_words(tmp_path):
    for seed, name in enumerate(("one", "two")):
        save(plain(seed), tmp_path / name, max_shard_size="1KB")
        (tmp_path / name / "SHA256.json").unlink()
    for name, what in damaged(tmp_path / "one", tmp_path / "two"):
        try:
            computes(tmp_path / "one")
        except (ValueError, OSError) as error:
            assert "one" in str(error), (name, what)  # noqa: PT017 (it may also load)
        else:
            assert what in ("a bit flipped", "swapped")


def test_files_that_are_not_of_the_saved_model_stay(tmp_path):
    save(plain(0), tmp_path, max_shard_size="1KB")
    mine = tmp_path / "model-of-my-own.safetensors"
    mine.write_bytes(b"mine")
    save(plain(1), tmp_path)
    assert mine.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {
        mine.name, "model.safetensors", "config.json", "SHA256.json",
    }  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [("1KB", "5GB"), ("5GB", "1KB")])
def test_weights_that_an_earlier_version_saved_do_not_stay_beside_new_ones(before, after, tmp_path):
    save(plain(0), tmp_path, max_shard_size=before)
    (tmp_path / "SHA256.json").unlink()
    save(plain(1), tmp_path, max_shard_size=after)
    assert torch.equal(computes(tmp_path), output(plain(1), (ONE,)))
    assert (tmp_path / "model.safetensors").exists() == (after == "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (after == "1KB")


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    save(plain(0), tmp_path)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["moeify.store.save"], "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save(plain(1), tmp_path)
    assert torch.equal(computes(tmp_path), output(plain(0), (ONE,)))
    assert not list(tmp_path.glob(".moeify*"))


def test_while_another_process_saves_into_a_folder_no_second_one_does(tmp_path):
    save(plain(0), tmp_path)
    with locked(tmp_path, SAVE_LOCK, ""), pytest.raises(OSError, match=r"another process is saving in .*wait until"):
        save(plain(1), tmp_path)
    assert torch.equal(computes(tmp_path), output(plain(0), (ONE,)))


def test_hashes_of_an_unknown_format_are_refused(tmp_path):
    save(plain(0), tmp_path)
    write_json(tmp_path / "SHA256.json", {"format": 2, "files": {}})
    with pytest.raises(ValueError, match="has the format 2, and this version of moeify reads format 1"):
        computes(tmp_path)
