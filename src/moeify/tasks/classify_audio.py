"""The task `classify-audio`: name the class of a sound. The small model is an audio spectrogram transformer (AST)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from moeify.data.audio import Sound, decode_pcm16, decode_wav
from moeify.data.records import inside, read_class_folders
from moeify.data.synthetic import melodies
from moeify.evaluate.objective import Units
from moeify.tasks.base import Setup, Shape, Task
from moeify.tasks.classify import Classes, Classification, LabelledSamples, groups, predictions
from moeify.tasks.classify_text import facts
from moeify.tasks.models import load_dense
from moeify.tasks.pieces import pieces
from moeify.tasks.rows import Row, read_parts


class OfSounds(Classification):
    """Classification of sounds."""

    units: ClassVar[Units] = Units("patch", "patches", "nats per sound")


TRAIN, HELD_OUT = 600, 90
"""Synthetic melodies in either part."""


@dataclass(frozen=True, kw_only=True)
class ClassifyAudio(Task):
    """Sounds with a label each, as .wav files or bytes of them; without data, synthetic melodies of three tones.

    Data are a folder with a folder per class, or rows with a path or the bytes of a sound, and a label.

    Attributes:
        audio: the field of a row that is a path, or the bytes of a .wav file, or of 16-bit samples at `rate`.
        label: the field that is the class.
        group: the field by which the report groups samples; without it the class, where there are few.
        validation: a file or folder of held-out sounds; without it, those that the data hold out, or a tenth.
        rate: samples per second of bytes without a header.
        seconds: the length of a sound for the small model, and for others without one; longer ones are cut.
        bins: frequency bins of the small model.
    """

    name: ClassVar[str] = "classify-audio"
    audio: str = "audio"
    label: str = "label"
    group: str | None = None
    validation: str | None = None
    rate: int = 16000
    seconds: float = 1.0
    bins: int = 64

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """List the sounds; one is read, and its features computed, when it is first used, and they are kept."""
        train, validation = self._rows(data)
        source = data or "synthetic melodies"
        classes = Classes.of([row["label"] for row in train], source)
        extractor = self._small_extractor(train) if model is None else load_dense(model, "AutoFeatureExtractor")

        def built() -> nn.Module:
            return small_ast(self.shape, extractor, classes) if model is None else load_audio_classifier(model, classes)

        features = Features(extractor, self.seconds)
        length = pieces(built(), features.of(train[0]["audio"]))
        parts = [self._samples(rows, features, classes, source, length) for rows in (train, validation)]
        objective = OfSounds()
        return Setup(
            train=parts[0],
            validation=parts[1],
            objective=objective,
            build=built,
            model=model or f"AST from scratch {vars(self.shape)}",
            data=source,
            facts=facts(classes, train, validation),
            save=lambda folder: _save(extractor, folder),
            probe=dict(torch.utils.data.default_collate([features.of(train[0]["audio"])] * 2)),
            answers=lambda trained: predictions(
                trained, parts[1], objective, classes, lambda i: f"held-out sound {i + 1}"
            ),
        )

    def _rows(self, data: str | None) -> tuple[list[Row], list[Row]]:
        """Rows with a label and, as `audio`, a function that reads the sound."""
        if data is None:
            made = [melodies(count, seed) for seed, count in enumerate((TRAIN, HELD_OUT))]
            train, held_out = ([{"audio": _itself(sound), "label": label} for sound, label in part] for part in made)
            return train, held_out
        if Path(data).is_dir() and any(Path(data).rglob("*.[wW][aA][vV]")):
            found = read_class_folders(data, (".wav",))
            parts, folder = [found.train, found.validation], found.folder
            read = "path"
        else:
            fields = {"audio": self.audio, "label": self.label}
            parts = list(read_parts(data, self.validation, fields, {"group": self.group or "domain"}))
            folder, read = Path(data) if Path(data).is_dir() else Path(data).parent, "audio"
        train, held_out = ([{**row, "audio": self._reader(row[read], folder)} for row in part] for part in parts)
        return train, held_out

    def _reader(self, value: Any, folder: Path) -> Callable[[], Sound]:
        """A function that reads the sound of a row: a path, bytes, or both in a mapping, as of the library datasets."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            path = inside(folder, value)
            return lambda: decode_wav(path.read_bytes(), path)
        if not isinstance(value, bytes):
            raise ValueError(f"the field {self.audio} is a {type(value).__name__}, not a path or bytes of a sound")
        if value[:4] == b"RIFF":
            return lambda: decode_wav(value, f"a sound in {folder}")
        return lambda: decode_pcm16(value, self.rate)

    def _samples(
        self, rows: Sequence[Row], features: Features, classes: Classes, source: str, length: int
    ) -> LabelledSamples:
        labels = [classes.number(row["label"], source) for row in rows]
        domains = groups(labels, classes, [row.get("group") for row in rows], Path(source).name)
        made = [cache(partial(features.of, row["audio"])) for row in rows]
        return LabelledSamples(made, labels, domains, length, lambda read: read())

    def _small_extractor(self, rows: Sequence[Row]) -> ASTFeatureExtractor:
        """Log-mel features of 25 ms every 10 ms at 16 kHz, standardised by some of the training sounds."""
        frames = max(16, round(100 * self.seconds) - 2)
        sizes = {"sampling_rate": 16000, "num_mel_bins": self.bins, "max_length": frames}
        raw = Features(ASTFeatureExtractor(**sizes, do_normalize=False))
        some = torch.stack([raw.of(row["audio"])["input_values"] for row in rows[:: max(1, len(rows) // 64)]])
        mean, deviation = some[some != 0].mean().item(), some[some != 0].std().item()  # 0 is padding
        return ASTFeatureExtractor(**sizes, mean=mean, std=deviation / 2)


def _itself(sound: Sound) -> Callable[[], Sound]:
    return lambda: sound


class Features:
    """Makes a model's inputs of a sound, by the feature extractor of transformers that belongs to the model.

    Args:
        extractor: of transformers; sounds are resampled to its rate.
        seconds: the length of all sounds, where the extractor has none of its own.
    """

    def __init__(self, extractor: Any, seconds: float = 1.0) -> None:
        self.extractor, self.rate = extractor, int(extractor.sampling_rate)
        has_length = hasattr(extractor, "max_length") or hasattr(extractor, "n_samples")  # AST; Whisper
        length = {"padding": "max_length", "max_length": round(seconds * self.rate), "truncation": True}
        self.options: dict[str, Any] = {} if has_length else length

    def of(self, read: Callable[[], Sound]) -> dict[str, Tensor]:
        """The inputs by name, without the dimension of the batch, of a sound that `read` returns."""
        made = self.extractor(
            read().at(self.rate).wave.numpy(), sampling_rate=self.rate, return_tensors="pt", **self.options
        )
        return {name: tensor[0] for name, tensor in made.items()}


def small_ast(shape: Shape, extractor: ASTFeatureExtractor, classes: Classes) -> nn.Module:
    """An AST from scratch on patches of 16 by 16, with a head for the classes."""
    config = ASTConfig(
        hidden_size=shape.width, intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, max_length=extractor.max_length, num_mel_bins=extractor.num_mel_bins,
        frequency_stride=16, time_stride=16, **classes.config(),
    )  # fmt: skip
    return ASTForAudioClassification(config)


def load_audio_classifier(model: str, classes: Classes) -> nn.Module:
    """A model of transformers in fp32 with a head for the classes, a new one where its own has others."""
    return load_dense(
        model, "AutoModelForAudioClassification", dtype=torch.float32, ignore_mismatched_sizes=True, **classes.config()
    )


def _save(extractor: Any, folder: Path) -> None:
    extractor.save_pretrained(folder)
