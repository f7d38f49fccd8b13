"""Random pauses between requests, so that devices do not all reconnect at the same time."""

from __future__ import annotations

import random

_DRAWS = random.SystemRandom()


def spread_s(pause_s: float, low: float, high: float) -> float:
    """Returns a pause in seconds between ``low`` and ``high`` times ``pause_s``.

    The draw uses the operating system. Python's global stream belongs to the task: private training
    would take a draw from it for one of the model's, and then process examples one by one, which
    is slower and rounds differently.
    """
    return pause_s * _DRAWS.uniform(low, high)
