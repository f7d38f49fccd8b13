"""Rejects settings that no privacy accounting covers, on reading a run's file.

The check comes before any data move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcore.config.run import RunConfig

SUMMED = ("FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")
"""Strategies that use only the mean of a round's updates."""


def unsound(run: RunConfig) -> list[str]:
    """Returns the contradictions to the run's ``privacy``, each with reason and remedy."""
    if run.privacy.unit == "none":
        return []
    return _leaks(run) + (_unbounded(run) if run.client_private else [])


def _leaks(run: RunConfig) -> list[str]:
    """Returns the settings that would bypass the noise."""
    federation, unit, found = run.federation, run.privacy.unit, list[str]()
    leaves = "leave each device without noise" if run.private else "be released without noise"
    if federation.evaluate_cohort and run.client_private:
        found.append(
            f"federation.evaluate_cohort = {federation.evaluate_cohort} contradicts privacy.unit = "
            f"{unit!r}: noise covers one example of a client's metrics, and not the client. Set "
            "evaluate_cohort to 0 (rounds are then judged on the cloud's held-out data), or "
            "privacy.unit to 'example' or 'none'."
        )
    if federation.normalisation == "federated":
        found.append(
            f"federation.normalisation = 'federated' contradicts privacy.unit = {unit!r}: exact "
            f"sums of examples would {leaves}. Use 'cloud' or 'task', or set "
            "privacy.unit to 'none'."
        )
    if federation.strategy == "QFedAvg":
        found.append(
            f"federation.strategy = 'QFedAvg' contradicts privacy.unit = {unit!r}: it weights "
            f"clients by their training loss, which would {leaves}. Choose another strategy, or "
            "set privacy.unit to 'none'."
        )
    return found


def _unbounded(run: RunConfig) -> list[str]:
    """Returns the settings that client-level noise does not cover, for one client's influence."""
    federation, client, found = run.federation, run.privacy.client, list[str]()
    unit = f"privacy.unit = {run.privacy.unit!r}"
    # A user-defined strategy is checked once it is loaded.
    if ":" not in federation.strategy and federation.strategy not in SUMMED:
        found.append(
            f"federation.strategy = {federation.strategy!r} contradicts {unit}: noise is added to "
            f"the sum of updates, and this strategy needs them one by one. Choose one of "
            f"{', '.join(SUMMED)}."
        )
    if federation.over_selection > 1:
        found.append(
            f"federation.over_selection = {federation.over_selection:g} contradicts {unit}: "
            "participation would depend on who responds first instead of on the server's random "
            "sampling. Set over_selection to 1; the noise does not depend on how many clients "
            "respond."
        )
    if client.mechanism == "matrix" and client.clip_norm == "adaptive":
        found.append(
            "privacy.client.clip_norm = 'adaptive' contradicts privacy.client.mechanism = "
            "'matrix': the accounting of noise correlated over rounds requires the same bound in "
            "all rounds. Set clip_norm to a number, or mechanism to 'gaussian'."
        )
    if client.mechanism == "gaussian" and client.separation is not None:
        found.append(
            f"privacy.client.separation = {client.separation} contradicts "
            "privacy.client.mechanism = 'gaussian': it samples clients independently in each "
            "round. Leave separation out, or set mechanism to 'matrix'."
        )
    return found
