"""`measure_drift`: how far what devices serve has moved from what it was at the release."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

from fedcore.artifacts.stability import SHIFTED
from fedcore.errors import ConfigError
from server.delivery.drift import ModelDrift, drift_of
from server.delivery.feedback import ServingBook

Place = str | PathLike[str]


def measure_drift(
    repository: Place,
    keys: Place,
    *,
    reports: Place = "reports",
    model: str | None = None,
    above: float = SHIFTED,
) -> tuple[ModelDrift, ...]:
    """Measures by devices' counts how far inputs and outputs have moved since the release.

    Devices tell these counts to ``fedcore release serve`` where their owners allow it. Imports
    neither torch nor Flower.

    Example::

        drifts = fedcore.measure_drift("releases", "keys", reports="reports")
        if any(drift.drifted for drift in drifts):
            fedcore.simulate(task, "run.toml")  # train again, here in a simulation

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.
        reports: The folder in which ``fedcore release serve`` keeps what devices tell.
        model: The model; None for all.
        above: The population stability index above which a feature has drifted.

    Returns:
        The stable version of each model, and a canary's, by name and version.

    Raises:
        ConfigError: ``above`` is no positive number.
        ReleaseError: there is no repository or no such model, or signatures don't verify.
    """
    if not 0 < above < math.inf:
        raise ConfigError(
            f"above = {above}: expected a positive number, e.g. {SHIFTED}. Nothing was measured."
        )
    book = ServingBook(Path(reports))
    return tuple(drift_of(Path(repository), Path(keys), book, above=above, model=model))
