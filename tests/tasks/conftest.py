from functools import partial

import pytest

from moeify.data.corpus import build_corpus
from moeify.tasks.models import sample


@pytest.fixture(scope="session")
def corpus():
    return build_corpus(cap=20_000)


@pytest.fixture(autouse=True)
def little_of_everything(monkeypatch, corpus):
    """Nothing is fetched, little text is read and written, and figures are made and not painted."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, file, **options: file.write_bytes(b"a picture"))
    for module in ("lm", "classify_text"):
        monkeypatch.setattr(f"moeify.tasks.{module}.build_corpus", lambda: corpus)
    monkeypatch.setattr("moeify.tasks.image_rows.TRAIN", 60)
    monkeypatch.setattr("moeify.tasks.image_rows.HELD_OUT", 20)
    monkeypatch.setattr("moeify.tasks.lm.sample", partial(sample, tokens=2))
    monkeypatch.setattr("moeify.cli.train.EVALUATED", 0)  # as few samples as may be
