from functools import partial

import pytest

from command_line import TINY, moeify, save_llama, write_text
from moeify.cli.text import sample


@pytest.fixture(autouse=True)
def no_hub_and_short_samples(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("moeify.cli.job.PROMPTS", ("def ",))
    monkeypatch.setattr("moeify.cli.job.sample", partial(sample, tokens=10))


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
