"""Flower makes messages only in a process that has a task identity."""

from __future__ import annotations

import pytest

from fedcore.flower.identity import assume_identity


@pytest.fixture(autouse=True)
def _flowers_identity() -> None:
    assume_identity(1)
