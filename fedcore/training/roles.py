"""Which clients only evaluate: those that hold back all of their data (``federation.holdout_by``).

Such a judge never trains, so a model is evaluated on clients that it has not learnt from. Whether a
client is one follows from its name and the run's share alone. The server and each device compute it
for themselves: a server cannot have a device train in one round and judge in the next.
"""

from __future__ import annotations

from fedcore.config.run import FederationConfig
from fedcore.seeds import derive

_SPAN = float(1 << 63)  # `derive` returns smaller numbers


def judging_place(name: str) -> float:
    """Returns a client's place from 0 to 1, drawn by its name.

    Those whose place is below the share are judges, so a larger share adds judges and removes none.
    """
    return derive(0, "judge", name) / _SPAN


def is_judge(federation: FederationConfig, name: str) -> bool:
    """Whether a client holds back all of its data: it evaluates models, and never trains."""
    return federation.has_judges and judging_place(name) < federation.holdout


def evaluates(federation: FederationConfig, name: str) -> bool:
    """Whether a client has data to evaluate rounds on."""
    return bool(federation.holdout) and (not federation.has_judges or is_judge(federation, name))
