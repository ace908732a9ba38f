from pathlib import Path

import pytest

from adapter_folders import ATTENTION, make_adapter, make_gates


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Three adapters with gates: of different ranks, and of maps that overlap in part."""
    made = {
        "law": make_adapter(tmp_path / "law", rank=2, seed=1),
        "med": make_adapter(tmp_path / "med", [*ATTENTION, "down_proj"], rank=4, seed=2),
        "bio": make_adapter(tmp_path / "bio", ["v_proj", "down_proj"], rank=1, seed=3),
    }
    return {name: make_gates(folder, seed) for seed, (name, folder) in enumerate(made.items())}
