"""A device with charges of two runs, for tests of what is shown and exported of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.edge_client.ledger.sites import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    made.charge("digits", 3)
    made.charge("wards", 20, noise=2.0)
    return made
