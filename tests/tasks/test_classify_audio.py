"""Sounds are classified from folders, paths and bytes, by the feature extractor that a model brings."""

from __future__ import annotations

import csv
import io
import math
import struct
import wave

import pytest
import torch

from moeify.data.audio import Sound
from moeify.tasks.base import Shape
from moeify.tasks.classify_audio import ClassifyAudio, Features

SMALL = {"shape": Shape(width=16, layers=1, heads=2, hidden=32), "bins": 16, "seconds": 0.2}


def samples(frequency: float, rate: int = 8000) -> bytes:
    return struct.pack("<1600h", *(int(9000 * math.sin(2 * math.pi * frequency * i / rate)) for i in range(1600)))


def wav(frequency: float) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(samples(frequency))
    return file.getvalue()


def prepare(data, **settings):
    return ClassifyAudio(**SMALL, **settings).prepare(None, str(data))


def folder_of_classes(place):
    for label, base in (("high", 2000), ("low", 200)):
        (place / label).mkdir()
        for i in range(10):
            (place / label / f"{i}.wav").write_bytes(wav(base + 10 * i))
    return place


def test_a_folder_of_classes_and_a_table_of_its_paths_give_the_same_samples(tmp_path):
    folder = folder_of_classes(tmp_path)
    classes = prepare(folder)
    with (folder / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["audio", "label"])
        rows.writerows([f"{label}/{i}.wav", label] for label in ("low", "high") for i in range(10))
    table = prepare(folder / "train.csv")
    assert classes.build().config.id2label == table.build().config.id2label == {0: "high", 1: "low"}
    for setup in (classes, table):
        assert (len(setup.train), len(setup.validation)) == (18, 2)
        assert setup.train[0]["input_values"].shape == (18, 16)


def test_bytes_are_wav_files_or_samples_at_a_rate(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    inputs = []
    for number, read in enumerate((wav, samples, lambda f: {"bytes": wav(f), "path": None})):
        rows = [{"audio": read(200 + 100 * i), "label": i % 2} for i in range(20)]
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
        file = tmp_path / f"{number}.parquet"
        train = prepare(file, rate=8000, validation=str(file)).train
        inputs.append(sorted(train[i]["input_values"].sum().item() for i in range(20)))
    for other in inputs[1:]:
        assert other == pytest.approx(inputs[0], abs=1e-2)


def test_the_features_of_a_model_are_those_of_its_extractor(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(sampling_rate=16000)
    for length in (800, 1000, 400):
        sound = Sound(torch.randn(length), 8000)
        given = Features(extractor, seconds=0.1).of(lambda sound=sound: sound)["input_values"]
        one_length = {"padding": "max_length", "max_length": 1600, "truncation": True}
        expected = extractor(sound.at(16000).wave.numpy(), sampling_rate=16000, **one_length)["input_values"][0]
        torch.testing.assert_close(given, torch.as_tensor(expected))


def test_the_training_sounds_are_standardised(tmp_path):
    setup = prepare(folder_of_classes(tmp_path))
    values = torch.stack([setup.train[i]["input_values"] for i in range(18)])
    assert abs(values.mean()) < 0.2
    assert 0.5 < values.std() < 2


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ("audio,label\n../b.wav,x\n0.wav,y\n", {}, "is not inside"),
        ("audio,label\na.wav,x\nb.wav,x\n", {}, "one class, 'x'"),
        ("file,label\na.wav,x\n", {}, "has no column 'audio'; it has: file, label"),
        ("audio,label\na.wav,x\nb.wav,y\nc.wav,x\nd.wav,y\n", {}, r"\.wav is not a .wav file"),
    ],
)
def test_what_is_no_sound_is_refused_by_name(tmp_path, rows, settings, message):
    for name in "abcd":
        (tmp_path / f"{name}.wav").write_bytes(b"OggS")
    (tmp_path / "train.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "train.csv", **settings)
