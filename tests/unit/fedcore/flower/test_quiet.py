from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.common.logger import FLOWER_LOGGER

from fedcore.flower.fleet import Fleet
from fedcore.flower.identity import assume_identity
from fedcore.flower.quiet import quiet, silence


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    level = FLOWER_LOGGER.level
    yield
    FLOWER_LOGGER.setLevel(level)


@pytest.mark.parametrize(("level", "lines"), [(quiet, 1), (silence, 0)])
def test_what_flower_says_of_a_peers_message_is_not_logged_on_a_live_server(
    level: Callable[[], None], lines: int, tmp_path: Path
) -> None:
    assume_identity(1)
    message = Message(RecordDict(), 5, "train", ttl=-1.0)
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    FLOWER_LOGGER.addHandler(handler)
    try:
        level()
        assert Fleet(tmp_path).state.store_message_res(message) is None
    finally:
        FLOWER_LOGGER.removeHandler(handler)
    assert len(told) == lines
