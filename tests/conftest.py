import gc
import os
import signal
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries that read it; processes that tests start get it as well

import pytest
import torch
from hypothesis import settings

for number, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, number):  # which nohup and scripts in the background have their programs ignore
        signal.signal(getattr(signal, number), usual)

torch.set_num_threads(1)
settings.register_profile("moeify", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("moeify")

for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():  # seeds are kept for it with the stack of the caller, which takes a millisecond
        device.manual_seed_all = lambda seed: None


imported = 0


def leave_imports_out():
    """Leave what was imported out of every later collection: a trainer collects garbage at each end of a run."""
    global imported
    if len(sys.modules) > imported + 50:
        gc.collect()
        gc.freeze()
        imported = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage while modules are imported, for there is none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    leave_imports_out()


def pytest_runtest_teardown():
    leave_imports_out()


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
