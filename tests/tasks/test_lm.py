"""Texts are learned in rows whose documents see each other, or are kept apart on request."""

from __future__ import annotations

import json
from itertools import pairwise

import torch

from moeify import sparsify
from moeify.evaluate.run import reading
from moeify.modes import in_evaluation
from moeify.sparsify import recipes
from moeify.tasks.base import Shape
from moeify.tasks.lm import LanguageModel

SMALL = {"length": 24, "shape": Shape(width=16, layers=2, heads=2, hidden=32)}
ROWS = [{"text": "abcdefgh"[: i % 8 + 1] * 3, "domain": "ab"[i % 2]} for i in range(60)]


def test_packed_documents_are_judged_as_if_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    setup = LanguageModel(**SMALL, packed=True).prepare(None, str(tmp_path / "rows.jsonl"))
    assert {setup.train.domain_of(i) for i in range(len(setup.train))} == {"a", "b"}
    torch.manual_seed(0)
    model = sparsify(setup.build(), recipes["mixtral"], verbose=False)
    batch = setup.objective.collate([setup.train[i] for i in (0, len(setup.train) - 1)])
    with in_evaluation(model), torch.no_grad():
        with reading(model, batch) as inputs:
            together = setup.objective.judge(model, inputs).losses
        for ids, positions, loss in zip(batch["input_ids"], batch["position_ids"], together, strict=True):
            starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
            assert len(starts) > 2
            documents = [ids[None, a:b] for a, b in pairwise(starts) if b - a > 1]
            tokens = [one.shape[1] - 1 for one in documents]
            alone = sum(model(one, labels=one).loss * n for one, n in zip(documents, tokens, strict=True))
            torch.testing.assert_close(alone / sum(tokens), loss, atol=1e-5, rtol=1e-5)


def test_the_report_continues_what_was_held_out_of_own_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    setup = LanguageModel(**SMALL).prepare(None, str(tmp_path / "rows.jsonl"))
    held_out = {bytes(i for i in row["input_ids"][:16] if i < 256).decode() for row in setup.validation}
    written = setup.answers(setup.build())
    assert 0 < len(written) <= 3
    assert all(any(text.startswith(beginning) for beginning in held_out) for text in written)
