"""Pauses between calls, spread so that devices that lost their server do not return together."""

from __future__ import annotations

import random

_DRAWS = random.SystemRandom()


def spread_s(pause_s: float, least: float, most: float) -> float:
    """A pause between ``least`` and ``most`` times ``pause_s``, in seconds.

    It comes from the operating system. Python's own stream belongs to the task: private training
    takes a number that is drawn from it for the model's, and takes examples one by one then, which
    is slower and rounds in another way.
    """
    return pause_s * _DRAWS.uniform(least, most)
