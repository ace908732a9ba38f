"""The task `seq2seq`: write one text for another, such as its translation. The small model is an M2M100 of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import M2M100Config, M2M100ForConditionalGeneration

from moeify.data.synthetic import numerals
from moeify.data.tagged import Tagged, TaggedBytes, TaggedTokens
from moeify.evaluate.objective import Batch, Judged, Objective, Units
from moeify.evaluate.run import on_device
from moeify.masks import IGNORED, of_labels
from moeify.modes import in_evaluation
from moeify.notices import notify
from moeify.tasks.base import Setup, Shape, Task
from moeify.tasks.models import load_dense, load_tokenizer
from moeify.tasks.rows import Row, read_parts

TRAIN, HELD_OUT = 4000, 300
"""Synthetic pairs in either part."""

GENERATED, AT_ONCE, SHOWN, FEW = 64, 32, 6, 8
"""Held-out pairs that are translated; in batches of; shown in the report; and needed for a score of one language."""


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """Pairs of texts; without data, synthetic ones: numbers in digits, written in English, German or Roman numerals.

    Data are rows with a source, a target and, if there are several, the language of the target, whose tag is the first
    token of both. Pairs of more than `length` tokens on one side are left out.

    Attributes:
        source: the field that is read.
        target: the field that is to be written.
        language: the field that names the language of the target; rows without it have one language.
        languages: those that are kept, separated by commas; all, if it is not given.
        validation: a file or folder of held-out pairs; without it, those that the data hold out, or a tenth.
    """

    name: ClassVar[str] = "seq2seq"
    source: str = "source"
    target: str = "target"
    language: str = "language"
    languages: str | None = None
    validation: str | None = None

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read and tokenize the pairs."""
        train, validation = self._rows(data)
        where = data or "synthetic: numbers in words and Roman numerals"
        languages = sorted({row["language"] for row in train})
        tags: Tagged = TaggedBytes(languages) if model is None else TaggedTokens(load_tokenizer(model), languages)
        parts = [self._pairs(rows, tags, where) for rows in (train, validation)]
        left_out = len(train) + len(validation) - sum(map(len, parts))
        objective = Translation(tags)

        def built() -> nn.Module:
            if model is not None:
                return load_dense(model, "AutoModelForSeq2SeqLM", dtype=torch.float32)
            return small_m2m100(self.shape, self.length, tags)

        return Setup(
            train=parts[0],
            validation=parts[1],
            objective=objective,
            build=built,
            model=model or f"M2M100 of bytes from scratch {vars(self.shape)}",
            data=where,
            facts={
                "languages": ", ".join(languages),
                "pairs": f"{len(parts[0]):,} to train on, {len(parts[1]):,} held out",
                "left out": f"{left_out:,} pairs of more than {self.length} tokens",
            },
            save=tags.save,
            answers=lambda trained: shown(trained, parts[1], objective),
            probe=objective.collate([parts[0][i] for i in range(2)]),
        )

    def _rows(self, data: str | None) -> tuple[list[Row], list[Row]]:
        if data is None:
            rows = numerals(TRAIN + HELD_OUT, seed=0)
            return list(rows[:TRAIN]), list(rows[TRAIN:])
        fields = {"source": self.source, "target": self.target}
        parts = read_parts(data, self.validation, fields, {"language": self.language})
        kept = None if self.languages is None else {name.strip() for name in self.languages.split(",")}
        train, held_out = ([_checked(row, data) for row in part] for part in parts)
        if kept is not None and (unknown := kept - {row["language"] for row in train}):
            known = ", ".join(sorted({row["language"] for row in train}))
            raise ValueError(f"{data} has no pair in {', '.join(sorted(unknown))}; its languages are: {known}")
        train, held_out = (
            [row for row in part if kept is None or row["language"] in kept] for part in (train, held_out)
        )
        return train, held_out

    def _pairs(self, rows: Sequence[Row], tags: Tagged, where: str) -> Translations:
        pairs = [
            (tags.source(row["source"], row["language"]), tags.target(row["target"], row["language"])) for row in rows
        ]
        fitting = [i for i, (source, target) in enumerate(pairs) if max(len(source), len(target)) <= self.length]
        if not fitting:
            raise ValueError(f"{where} has no pair of at most {self.length} tokens; raise --length")
        return Translations([rows[i] for i in fitting], [pairs[i] for i in fitting])


def _checked(row: Row, where: str) -> Row:
    """A row whose texts are texts, and whose language has a name."""
    for role in ("source", "target"):
        if not isinstance(row[role], str) or not row[role].strip():
            raise ValueError(f"{where}: a {role} is a text, not {row[role]!r:.60}")
    return row | {"language": str(row.get("language") or "target")}


class Translations(Dataset[dict[str, Any]]):
    """Pairs of token ids.

    Args:
        rows: the texts: `source`, `target` and `language`.
        pairs: the tokens of source and target of each.
    """

    def __init__(self, rows: Sequence[Row], pairs: Sequence[tuple[list[int], list[int]]]) -> None:
        self.rows, self.pairs = rows, pairs
        self.length = round(fmean(max(map(len, pair)) for pair in pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids` and `labels` of a pair."""
        source, target = self.pairs[index]
        return {"input_ids": source, "labels": target}

    def domain_of(self, index: int) -> str:
        """Return the language of the target."""
        return self.rows[index]["language"]


class Translation(Objective):
    """Cross-entropy of the tokens of the target, their accuracy, and chrF of what the model writes.

    Args:
        tags: makes tokens of texts and languages.
    """

    units: ClassVar[Units] = Units()

    def __init__(self, tags: Tagged) -> None:
        self.tags = tags

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Pad sources and targets on the right."""
        sources = [torch.tensor(sample["input_ids"]) for sample in samples]
        ids = nn.utils.rnn.pad_sequence(sources, True, self.tags.pad)
        labels = [torch.tensor(sample["labels"]) for sample in samples]
        lengths = torch.tensor([len(source) for source in sources])
        padded = nn.utils.rnn.pad_sequence(labels, True, IGNORED)
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long(),
            "labels": padded,
            "decoder_attention_mask": of_labels(padded),
        }

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the mean loss of every target in nats per token, and how many of its tokens were predicted."""
        labels, logits = batch["labels"], model(**batch).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)  # (B, N)
        real = labels != IGNORED
        right = ((logits.argmax(-1) == labels) & real).sum()
        return Judged(losses.sum(1) / real.sum(1), (right, real.sum()))

    def scores(self, answers: Sequence[Any]) -> dict[str, float]:
        """Return the share of the targets' tokens that is predicted from those before them."""
        right, real = (sum(int(answer[i]) for answer in answers) for i in range(2))
        return {"token accuracy": right / real}

    def final_scores(self, model: nn.Module, samples: Any) -> dict[str, float]:
        """Return chrF of greedy translations, of all and of each language; nothing without the library sacrebleu."""
        try:
            from sacrebleu.metrics.chrf import CHRF
        except ImportError:
            notify(
                "moeify: chrF needs sacrebleu, pip install 'moeify[translation]'; without it there is token accuracy"
            )
            return {}
        rows, written = translated(model, samples, self, GENERATED)
        groups: dict[str, list[int]] = {"chrF": list(range(len(rows)))}
        for i, row in enumerate(rows):
            groups.setdefault(f"chrF {row['language']}", []).append(i)
        return {
            name: CHRF().corpus_score([written[i] for i in chosen], [[rows[i]["target"] for i in chosen]]).score
            for name, chosen in groups.items()
            if len(chosen) >= FEW or name == "chrF"
        }


def of_each_language(samples: Translations, most: int) -> list[int]:
    """Which held-out pairs are translated: evenly taken of every language; of `GENERATED` or more, `FEW` at least."""
    members: dict[str, list[int]] = {}
    for i in range(len(samples)):
        members.setdefault(samples.domain_of(i), []).append(i)
    each = max(FEW if most >= GENERATED else 1, most // len(members))
    chosen = [i for some in members.values() for i in some[:: max(1, len(some) // each)][:each]]
    return sorted(chosen) if most >= GENERATED else sorted(chosen)[:most]


@torch.no_grad()
def translated(
    model: nn.Module, samples: Translations, objective: Translation, most: int
) -> tuple[list[Row], list[str]]:
    """Held-out pairs, as many of each language, and what a model writes for their sources, by its likeliest tokens."""
    chosen = of_each_language(samples, most)
    write: Any = model
    written: list[str] = []
    for start in range(0, len(chosen), AT_ONCE):
        some = chosen[start : start + AT_ONCE]
        batch = on_device(objective.collate([samples[i] for i in some]), next(model.parameters()).device)
        begin = objective.tags.begin(model, [samples.rows[i]["language"] for i in some]).to(batch["input_ids"].device)
        longest = batch["labels"].shape[1] * 3 // 2
        with in_evaluation(model):
            out = write.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=begin,
                max_new_tokens=longest, do_sample=False, num_beams=1, pad_token_id=objective.tags.pad,
            )  # fmt: skip
        written += [objective.tags.decode(row) for row in out[:, begin.shape[1] :].tolist()]
    return [samples.rows[i] for i in chosen], written


def shown(model: nn.Module, samples: Translations, objective: Translation) -> list[str]:
    """A few translations, one line each."""
    rows, written = translated(model, samples, objective, SHOWN)
    lines = [
        f"{row['source']} -> {row['language']}: {text}" + ("" if text == row["target"] else f" (it is {row['target']})")
        for row, text in zip(rows, written, strict=True)
    ]
    return ["\n".join(lines)]


def small_m2m100(shape: Shape, length: int, tags: Tagged) -> nn.Module:
    """An M2M100 from scratch, the class of dense NLLB models, as deep in decoder as in encoder, without dropout."""
    config = M2M100Config(
        vocab_size=tags.vocab_size, d_model=shape.width, encoder_layers=shape.layers, decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads, decoder_attention_heads=shape.heads, encoder_ffn_dim=shape.hidden,
        decoder_ffn_dim=shape.hidden, max_position_embeddings=tags.pad + 2 * length, dropout=0.0, attention_dropout=0.0,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, pad_token_id=tags.pad, eos_token_id=tags.end,
        bos_token_id=tags.end, decoder_start_token_id=tags.end,
    )  # fmt: skip
    return M2M100ForConditionalGeneration(config)
