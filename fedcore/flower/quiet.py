"""Silences Flower's logger, which reports every step of a strategy; fedcore reports the run."""

from __future__ import annotations

import logging

from flwr.common.logger import FLOWER_LOGGER


def quiet() -> None:
    """Lets only errors through Flower's logger."""
    FLOWER_LOGGER.setLevel(logging.ERROR)
