"""A server in this process, over a model of one matrix."""

from __future__ import annotations

import pytest

from tests.serving import Running, running, store_of


@pytest.fixture(scope="session")
def first_server(tmp_path_factory: pytest.TempPathFactory) -> Running:
    """One server for all tests that change nothing."""
    with running(store_of(tmp_path_factory.mktemp("serving"), {"product": 1})) as server:
        yield server
