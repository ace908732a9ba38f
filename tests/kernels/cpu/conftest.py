from __future__ import annotations

import pytest

from levels import COMPILED, OTHERS
from nights import nightly


@pytest.fixture(params=[*COMPILED, *map(nightly, OTHERS)])
def level(request, monkeypatch):
    """The kernels of one instruction set."""
    name, _, options = request.param.partition(" ")
    monkeypatch.setenv("MOEIFY_CPP", name)
    monkeypatch.setenv("MOEIFY_CXXFLAGS", options)
