"""Pictures and captions are matched: recall by hand, pairs from tables, equal captions, and refusals in one line."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.tasks.base import Shape
from moeify.tasks.contrastive import Contrastive, recall

SMALL = {"shape": Shape(width=16, layers=1, heads=2, hidden=32), "size": 16}


def png(colour: int, size: int = 9) -> bytes:
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").new("RGB", (size, size), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(path, rows):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return str(path)


def test_recall_counts_the_right_one_among_the_nearest():
    similarity = torch.tensor([[3.5, 2.0, 1.0], [3.0, 2.5, 1.0], [1.0, 2.0, 3.0]])
    found = recall(similarity, ["a", "b", "c"])
    assert found["caption recall@1"] == pytest.approx(2 / 3)
    assert found["picture recall@1"] == pytest.approx(1)
    assert found["caption recall@5"] == found["picture recall@5"] == 1


def test_equal_captions_are_right_for_each_other():
    similarity = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert recall(similarity, ["a", "b"])["caption recall@1"] == 0
    assert recall(similarity, ["a", "a"])["caption recall@1"] == 1


@given(st.integers(2, 12).flatmap(lambda n: st.permutations(range(n))))
def test_recall_does_not_depend_on_the_order_of_pairs(order):
    similarity = torch.randn(len(order), len(order))
    captions = [i // 2 for i in range(len(order))]
    place = torch.tensor(order)
    assert recall(similarity, captions) == pytest.approx(
        recall(similarity[place][:, place], [captions[i] for i in order])
    )


def test_pairs_of_a_table_are_scaled_and_their_captions_end(tmp_path):
    rows = [{"image": png(10 * i), "caption": f"red {i}"} for i in range(20)]
    setup = Contrastive(**SMALL).prepare(None, table(tmp_path / "train.parquet", rows))
    assert (len(setup.train), len(setup.validation)) == (18, 2)
    sample = setup.train[0]
    assert sample["pixel_values"].shape == (3, 16, 16)
    assert (sample["pixel_values"][1] == -1).all()
    assert sample["input_ids"][-1] == 256


def test_the_loss_of_a_batch_is_the_mean_of_its_pairs():
    setup = Contrastive(**SMALL).prepare(None, None)
    torch.manual_seed(0)
    model = setup.build().eval()
    batch = setup.objective.collate([setup.train[i] for i in range(5)])
    with torch.no_grad():
        assert setup.objective.judge(model, dict(batch)).losses.mean().item() == pytest.approx(
            model(**batch).loss.item()
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"GIF", "caption": "a"}, "is not an image that can be read"),
        ({"image": 3, "caption": "a"}, "an image is bytes, a path or an array"),
        ({"image": png(1), "caption": " "}, "a caption is a text, not ' '"),
        ({"picture": png(1), "caption": "a"}, "has no column 'image'; it has: picture, caption"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        Contrastive(**SMALL).prepare(None, table(tmp_path / "train.parquet", [row] * 2 + [row | {"caption": "b"}] * 2))
