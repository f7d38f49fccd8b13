"""Flower reports every step of a strategy on its own logger; a run tells its story once."""

from __future__ import annotations

import logging

from flwr.common.logger import FLOWER_LOGGER


def quiet() -> None:
    """Lets only Flower's errors through."""
    FLOWER_LOGGER.setLevel(logging.ERROR)
