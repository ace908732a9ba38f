from functools import partial

import pytest

from command_line import TINY, moeify, save_llama, write_text
from moeify.tasks.models import sample


@pytest.fixture(autouse=True)
def no_hub_and_short_samples(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("moeify.tasks.lm.PROMPTS", ("def ",))
    monkeypatch.setattr("moeify.tasks.lm.sample", partial(sample, tokens=10))


@pytest.fixture(autouse=True)
def pictures_are_not_painted(monkeypatch, request):
    """Figures are made and not painted, which is half the time of a tiny run, unless a test takes `real_pictures`."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(figure, "savefig", lambda self, file, **options: file.write_bytes(b"a picture"))


@pytest.fixture
def real_pictures():
    """Marks a test whose pictures are painted, as those of `trained` are."""


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text):
    """The folder of a finished run, and what the command wrote."""
    folder = tmp_path_factory.mktemp("runs") / "train"
    return folder, moeify("train", *TINY, "--data", text, "--output", folder)
