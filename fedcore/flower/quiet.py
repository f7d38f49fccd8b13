"""Silences Flower's logger, which reports every step of a strategy; fedcore reports the run."""

from __future__ import annotations

import logging

from flwr.common.logger import FLOWER_LOGGER


def quiet() -> None:
    """Lets only errors through Flower's logger."""
    FLOWER_LOGGER.setLevel(logging.ERROR)


def silence() -> None:
    """Lets nothing through Flower's logger, for a live server.

    Its errors there are about what peers send. The server refuses that itself, and logs it with the
    peer's name and within the limits on lines about peers, which Flower's logger goes around.
    """
    FLOWER_LOGGER.setLevel(logging.CRITICAL + 1)
