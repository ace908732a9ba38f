"""The fixture `ranks`: one pool of processes for all tests of a session."""

from collections.abc import Iterator

import pytest

from distributed.pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(2, case, *arguments)` gives what both ranks answer to `case(rank, 2, *arguments)`."""
    pool = Pool()
    yield pool
    pool.close()
