import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries that read it; processes that tests start get it as well

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("moeify", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("moeify")

for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():  # seeds are kept for it with the stack of the caller, which takes a millisecond
        device.manual_seed_all = lambda seed: None


def pytest_collection_finish():
    """Leave what was imported out of every later collection: a trainer collects garbage at each end of a run."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    assert torch.empty(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
