"""Images are classified from arrays, folders and tables; super-classes reach the routers that look them up."""

from __future__ import annotations

import json
import re

import pytest
import torch

from command_line import TINY, moeify
from moeify.data.images import fitted, image_of
from moeify.data.synthetic import strokes
from moeify.sparsify import read_recipe
from moeify.tasks.base import Shape, require_inputs
from moeify.tasks.classify_image import ClassifyImage
from moeify.tasks.image_models import load_image_classifier, pixels_of

SMALL = {"shape": Shape(width=16, layers=2, heads=2, hidden=32)}
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")


def arrays(file, count=40):
    images, digits = strokes(count, 0, size=8)
    numpy.savez(file, images=(images * 255).byte().numpy(), digit=digits.numpy(), odd=(digits % 2).numpy())
    return str(file)


def prepare(data, model=None, **settings):
    return ClassifyImage(**SMALL, **settings).prepare(model, data)


def test_strokes_are_the_same_for_a_seed_and_all_digits_are_equally_frequent():
    (one, digits), (again, _), (other, _) = (strokes(20, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert digits.bincount().tolist() == [2] * 10
    assert 0 <= one.min() < one.max() <= 1


def test_arrays_have_a_row_per_image_and_a_super_class_that_routers_look_up(tmp_path):
    setup = prepare(arrays(tmp_path / "a.npz"), image="images", label="digit", group="odd")
    assert setup.train.length == 8 * 8 + 1
    for part in (setup.train, setup.validation):
        for i in range(len(part)):
            assert part[i]["pixel_values"].shape == (1, 8, 8)
            assert part[i]["super_class"].item() == part[i]["labels"].item() % 2 == int(part.domain_of(i))


def test_folders_of_images_have_a_class_each_and_colours_are_kept(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("RGB", (20, 16), (i, 100, 200)).save(tmp_path / name / f"{i}.png")
    setup = prepare(str(tmp_path))
    assert setup.build().config.id2label == {0: "cat", 1: "dog"}
    assert setup.train[0]["pixel_values"].shape == (3, 16, 16)
    assert setup.train[0]["pixel_values"][2].mean().item() == pytest.approx(200 / 127.5 - 1, abs=1e-5)


def test_rows_hold_bytes_or_paths_and_a_group(tmp_path):
    rows = []
    for i in range(20):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "kind": i % 2, "super": "a" if i % 2 else "b"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    setup = prepare(str(tmp_path / "train.jsonl"), image="file", label="kind", group="super")
    assert {setup.train.domain_of(i) for i in range(len(setup.train))} == {"a", "b"}


def test_an_image_is_read_from_every_form_that_data_sets_have(tmp_path):
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    forms = [data, "a.png", {"bytes": data}, {"path": "a.png"}, picture, numpy.asarray(picture)]
    for form in forms:
        assert image_of(form, tmp_path, "here")[:, 0, 0].tolist() == [1, 2, 3]
    assert image_of(numpy.zeros((4, 5)), tmp_path, "here").shape == (1, 4, 5)
    wrong = [(b"GIF", "is not an image"), (numpy.zeros(4), "an image is bytes"), ("../a.png", "not inside")]
    for form, message in wrong:
        with pytest.raises(ValueError, match=message):
            image_of(form, tmp_path, "here")


def test_scaling_keeps_a_plain_colour_and_changes_channels():
    image = torch.full((3, 9, 6), 77, dtype=torch.uint8)
    assert fitted(image, 4, 1).unique().tolist() == [77]
    assert fitted(image[:1], 12, 3).shape == (3, 12, 12)


def test_super_classes_are_found_in_what_a_dense_model_confuses(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("moeify.tasks.confused.STEPS", 2)
    setup = prepare(arrays(tmp_path / "a.npz"), image="images", label="digit", super_classes=3)
    of_class = {setup.train.labels[i]: setup.train.super_classes[i] for i in range(len(setup.train))}
    assert len(set(of_class.values())) == 3
    assert all(of_class[label] == s for label, s in zip(setup.train.labels, setup.train.super_classes, strict=True))


def test_mobile_v_moe_learns_super_classes_in_one_line(tmp_path):
    data = arrays(tmp_path / "a.npz", 60)
    ended = moeify(
        "train", *TINY, "--task", "classify-image", "--data", data, "--set", "image=images", "--set", "label=digit",
        "--set", "group=odd", "--recipe", "mobile-vmoe", "--experts", 2, "--loss", "supervision=0.3", "--balance", 0,
        "--steps", 2, "--evaluations", 1, "--output", tmp_path / "run",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert "supervision (weight 0.3)" in ended.out
    assert "forward FLOPs per patch " in ended.out
    assert "per token" not in ended.out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["facts"]["super-classes"] == "2"


def test_soft_moe_trains_without_a_table_of_experts(tmp_path):
    ended = moeify(
        "train", *TINY, "--task", "classify-image", "--recipe", "soft", "--experts", 4, "--steps", 2,
        "--evaluations", 1, "--output", tmp_path / "run",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^step 2/2  loss [\d.]+  [\d,]+ samples/s$", ended.out, re.MULTILINE)
    assert "no table of experts: no sparse layer sends its tokens to experts of their own" in ended.out
    assert not (tmp_path / "run" / "experts.png").exists()


def test_a_saved_vision_model_is_read_with_its_own_pixels_and_gets_a_head_of_these_classes(tmp_path):
    setup = prepare(arrays(tmp_path / "a.npz"), image="images", label="digit")
    setup.build().save_pretrained(tmp_path / "vit")
    setup.save(tmp_path / "vit")
    pixels = pixels_of(str(tmp_path / "vit"))
    assert (pixels.size, pixels.channels, pixels.mean, pixels.std) == (8, 1, (0.5,), (0.5,))
    other = prepare(arrays(tmp_path / "b.npz"), str(tmp_path / "vit"), image="images", label="odd")
    assert other.build().config.num_labels == 2
    assert other.train.length == setup.train.length


def test_a_module_of_plain_pytorch_is_trained_as_it_is(tmp_path):
    source = """
    from torch import nn

    def make(classes):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.patch, self.layer, self.head = nn.Conv2d(1, 16, 4, 4), layer, nn.Linear(16, classes)
            def forward(self, x):
                return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
        return Net()
    """
    (tmp_path / "net.py").write_text("\n".join(line[4:] for line in source.splitlines()))
    setup = prepare(arrays(tmp_path / "a.npz"), f"{tmp_path / 'net.py'}:make", image="images", label="digit")
    batch = setup.objective.collate([setup.train[i] for i in range(3)])
    assert setup.build()(**batch).logits.shape == (3, 10)
    assert setup.train.length == 4
    with pytest.raises(ValueError, match="has no function 'mak'"):
        load_image_classifier(f"{tmp_path / 'net.py'}:mak", None)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    data = arrays(tmp_path / "a.npz")
    for settings, message in (
        ({"image": "pixels", "label": "digit"}, "has no array 'pixels'; it has: images, digit, odd"),
        ({"image": "images", "label": "digit", "patch": 3}, "8 pixels cannot be cut into patches of 3"),
        ({"image": "images", "label": "digit", "group": "odd", "super_classes": 2}, "set one of the two"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(data, **settings)
    setup = prepare(data, image="images", label="digit")
    with pytest.raises(ValueError, match="router looks up 'input_ids', and the samples of classify-image have pixel_v"):
        require_inputs(read_recipe("hash"), setup, "classify-image")


def test_a_model_that_does_not_tell_its_size_is_given_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ResNetConfig(num_channels=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not tell the size of its images; give it by --set size=PIXELS"):
        pixels_of(str(tmp_path))
    assert pixels_of(str(tmp_path), 24).size == 24
