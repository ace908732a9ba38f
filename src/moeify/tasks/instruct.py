"""The task `instruct`: answer instructions. Only answers are learned; routers may know the instruction's cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from moeify.compose import Clusters, MeanPooling, cluster
from moeify.compose.clusters import Embed
from moeify.data.fields import CHATS, NoField
from moeify.data.synthetic import errands
from moeify.data.tokenizer import ByteTokenizer
from moeify.evaluate.objective import Batch, Judged, Objective, Units
from moeify.evaluate.run import on_device, reading
from moeify.modes import in_evaluation
from moeify.routers import Cluster
from moeify.sparsify import Recipe
from moeify.tasks.base import Setup, Task
from moeify.tasks.lm import load_causal, small_llama
from moeify.tasks.models import load_model, save_tokenizer, saved_tokenizer
from moeify.tasks.rows import Row, read_parts, value_of
from moeify.tasks.words import HashedWords

TRAIN, HELD_OUT = 4000, 300
"""Synthetic instructions in either part."""

CLUSTERED, SHOWN, IGNORED = 4096, 6, -100
"""The most instructions that clusters are found in; answers that the report shows; the label of what is not learned."""


@dataclass(frozen=True, kw_only=True)
class Instruct(Task):
    """Instructions with answers; without data, synthetic errands on numbers and letters.

    Data are rows with an instruction and an answer, or with the messages of a chat, the last of which is the answer.
    Those of more than `length` tokens are left out.

    Attributes:
        instruction: the field of the instruction.
        answer: the field of the answer.
        group: the field by which the report groups samples.
        clusters: clusters of instructions, for routers that look them up; 0 for as many as the recipe's router knows.
        validation: a file or folder of held-out rows; without it, those that the data hold out, or a tenth.
    """

    name: ClassVar[str] = "instruct"
    instruction: str = "instruction"
    answer: str = "answer"
    group: str = "group"
    clusters: int = 0
    validation: str | None = None

    def suited_to(self, recipe: Recipe) -> Self:
        """Find as many clusters of instructions as the recipe's router has embeddings of (MoCLE)."""
        known = [part.clusters for part in recipe.router(8, recipe.num_experts).modules() if isinstance(part, Cluster)]
        if not known:
            return self
        if self.clusters > known[0]:
            raise ValueError(
                f"clusters={self.clusters} are more than the {known[0]} that this recipe's router has embeddings of; "
                "ask for fewer, or raise `clusters` of the router in a recipe file"
            )
        return replace(self, clusters=self.clusters or known[0])

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read and tokenize the instructions, and cluster them where routers are to know their cluster."""
        train, validation = self._rows(data)
        where = data or "synthetic errands on numbers and letters"
        tokenizer: Any = ByteTokenizer() if model is None else saved_tokenizer(model)
        written = [[_tokens(tokenizer, row) for row in rows] for rows in (train, validation)]
        kept = [
            [(row, *ids) for row, ids in zip(rows, some, strict=True) if sum(map(len, ids)) <= self.length]
            for rows, some in zip((train, validation), written, strict=True)
        ]
        if not all(kept):
            raise ValueError(f"{where} has no instruction and answer of at most {self.length} tokens; raise --length")
        found, embed = self._clusters([row["instruction"] for row, *_ in kept[0]], model, tokenizer)
        columns = [None if found is None else found.column([row["instruction"] for row, *_ in p], embed) for p in kept]
        parts = [Instructions(some, column) for some, column in zip(kept, columns, strict=True)]
        left_out = len(train) + len(validation) - sum(map(len, parts))
        objective = Answering(tokenizer)

        def save(folder: Path) -> None:
            save_tokenizer(tokenizer, folder)
            if found is not None:
                found.save(folder)

        return Setup(
            train=parts[0],
            validation=parts[1],
            objective=objective,
            build=lambda: small_llama(self.shape, self.length) if model is None else load_causal(model),
            model=model or f"Llama from scratch {vars(self.shape)}",
            data=where,
            facts={
                "instructions": f"{len(parts[0]):,} to train on, {len(parts[1]):,} held out",
                "left out": f"{left_out:,} of more than {self.length} tokens",
            } | ({} if found is None else {"clusters": f"{len(found)} of instructions"}),
            save=save,
            answers=lambda trained: shown(trained, parts[1], objective),
            probe=_probe(objective, parts[0]),
        )  # fmt: skip

    def _rows(self, data: str | None) -> tuple[list[Row], list[Row]]:
        if data is None:
            rows = errands(TRAIN + HELD_OUT, seed=0)
            return list(rows[:TRAIN]), list(rows[TRAIN:])
        others = {"group": self.group}
        try:
            fields = {"instruction": self.instruction, "answer": self.answer}
            parts = read_parts(data, self.validation, fields, others)
        except NoField as missing:
            parts = self._chats(data, others, missing)
        for row in (row for part in parts for row in part):
            for role in ("instruction", "answer"):
                if not isinstance(row[role], str) or not row[role].strip():
                    raise ValueError(f"{data}: an {role} is a text, not {row[role]!r:.60}")
        return parts

    def _chats(self, data: str, others: dict[str, str], missing: NoField) -> tuple[list[Row], list[Row]]:
        """The rows of a file whose samples are chats: all messages but the last are the instruction."""
        for field in CHATS:
            try:
                train, validation = read_parts(data, self.validation, {"chat": field}, others)
            except NoField:
                continue
            return [_of_chat(row, data) for row in train], [_of_chat(row, data) for row in validation]
        raise missing

    def _clusters(
        self, instructions: Sequence[str], model: str | None, tokenizer: Any
    ) -> tuple[Clusters | None, Embed]:
        """The clusters of instructions, None if no router asks for them; and what embeds further instructions."""
        beside = model is not None and (Path(model) / "clusters.safetensors").is_file()
        if not (self.clusters or beside):
            return None, HashedWords()
        embed: Embed = HashedWords()
        if model is not None:
            base = load_model(Path(model)) if Path(model).is_dir() else load_causal(model)
            embed = MeanPooling(base.float(), tokenizer)
            if beside:
                return Clusters.load(model), embed
        some = instructions[:: max(1, len(instructions) // CLUSTERED)][:CLUSTERED]
        return cluster(some, embed, min(self.clusters, len(some))), embed


def _of_chat(row: Row, where: str) -> Row:
    messages = row.pop("chat")
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where}: a chat has an instruction and an answer, not {messages!r:.60}")
    *before, last = messages
    speaker, _, answer = value_of([last], where).partition(": ")
    asked = value_of(before, where)
    if len(before) == 1:  # no need to say who asks
        asked = asked.partition(": ")[2]
    if speaker not in ("assistant", "gpt", "model"):
        raise ValueError(f"{where}: the last message of a chat is the assistant's, not of {speaker!r}")
    return row | {"instruction": asked, "answer": answer}


def _tokens(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """The tokens of an instruction, which a chat template writes where the tokenizer has one, and of its answer."""
    end = [tokenizer.eos_token_id]
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(row["instruction"] + "\n"), tokenizer.encode(row["answer"]) + end
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    else:
        prompt = tokenizer.encode(row["instruction"] + "\n")
    return list(prompt), tokenizer.encode(row["answer"], add_special_tokens=False) + end


class Instructions(Dataset[dict[str, Any]]):
    """Instructions with their answers as one sequence of tokens each.

    Args:
        samples: row, tokens of the instruction and tokens of the answer, each.
        clusters: of each instruction.
    """

    def __init__(
        self, samples: Sequence[tuple[Row, list[int], list[int]]], clusters: Sequence[int] | None = None
    ) -> None:
        self.samples, self.clusters = samples, clusters
        self.length = round(fmean(len(asked) + len(answer) for _, asked, answer in samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids` and `labels`, of which those of the instruction are ignored, and `cluster` if known."""
        _, asked, answer = self.samples[index]
        sample = {"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer}
        return sample if self.clusters is None else sample | {"cluster": self.clusters[index]}

    def domain_of(self, index: int) -> str:
        """Return the group of a sample."""
        return str(self.samples[index][0].get("group") or "instructions")


class Answering(Objective):
    """Cross-entropy of the tokens of the answer, their perplexity, and how often all of them are the likeliest ones.

    Args:
        tokenizer: its end of text pads where it has no padding.
    """

    units: ClassVar[Units] = Units(loss="nats per token of the answer")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad = tokenizer.eos_token_id if pad is None else pad

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Pad on the right."""
        ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        lengths = torch.tensor([len(each) for each in ids])
        padded = nn.utils.rnn.pad_sequence(ids, True, self.pad)
        batch = {
            "input_ids": padded,
            "attention_mask": (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long(),
            "labels": nn.utils.rnn.pad_sequence([torch.tensor(s["labels"]) for s in samples], True, IGNORED),
        }
        return batch | {k: torch.tensor([s[k] for s in samples]) for k in ("cluster",) if k in samples[0]}

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the mean loss of every answer in nats per token, which answers are right, and how many tokens are."""
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        asked = labels == IGNORED
        right = (logits.argmax(-1) == labels) | asked
        mean = losses.sum(1) / (~asked).sum(1)
        return Judged(mean, (mean, right.all(1)))

    def scores(self, answers: Sequence[Any]) -> dict[str, float]:
        """Return the perplexity of an answer, and the share of answers that greedy decoding gets right to the end."""
        losses, right = (torch.cat([answer[i] for answer in answers]) for i in range(2))
        return {"perplexity": losses.mean().exp().item(), "exact match": right.float().mean().item()}


def _probe(objective: Answering, samples: Instructions) -> dict[str, Any]:
    """Two samples as a model takes them."""
    batch = objective.collate([samples[i] for i in range(min(2, len(samples)))])
    return {name: value for name, value in batch.items() if name != "labels"}


@torch.no_grad()
def shown(model: nn.Module, samples: Instructions, objective: Answering) -> list[str]:
    """What a model answers to a few held-out instructions, by its likeliest tokens, one line each."""
    chosen = list(range(0, len(samples), max(1, len(samples) // SHOWN)))[:SHOWN]
    return ["\n".join(_answered(model, samples, objective, chosen))]


def _answered(model: Any, samples: Instructions, objective: Answering, chosen: Sequence[int]) -> Iterator[str]:
    device, decode = next(model.parameters()).device, _decoder(objective.tokenizer)
    for i in chosen:
        row, asked, answer = samples.samples[i]
        sample = {"input_ids": asked, "labels": [IGNORED] * len(asked)} | (
            {} if samples.clusters is None else {"cluster": samples.clusters[i]}
        )
        batch = on_device(objective.collate([sample]), device)
        with in_evaluation(model), reading(model, batch) as inputs:
            inputs.pop("labels", None)
            out = model.generate(
                **inputs, max_new_tokens=len(answer) + 8, do_sample=False, pad_token_id=objective.pad,
                eos_token_id=objective.tokenizer.eos_token_id,
            )  # fmt: skip
        text = decode(out[0, len(asked) :].tolist()).strip()
        right = "" if text == row["answer"].strip() else f" (it is {row['answer'].strip()!r:.80})"
        yield f"{' '.join(row['instruction'].split()):.100} -> {text!r:.80}{right}"


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.decode
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
