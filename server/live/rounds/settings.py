"""What devices are told of a run."""

from __future__ import annotations

from pathlib import PurePath

from fedcore.config.run import FederationConfig, RunConfig
from fedcore.rpc.hello import INSTANCE, SETTINGS
from server.rounds.own_strategy import is_own


def device_settings(run: RunConfig, *, instance: str) -> dict[str, str]:
    """The parts of a run's configuration that local training keeps to.

    Paths, a strategy of the user's own, the server's keys and the seed stay here: a device's noise
    is its own. ``instance`` is the same when a run is resumed and another when it is begun again: a
    device sends a finished update again for the one, and trains again for the other.
    """
    federation = run.federation.model_copy(update={"initial": None})
    if is_own(federation.strategy):  # its file is the server's alone; clients do without
        plain = FederationConfig()
        options = plain.strategy_options
        federation = federation.model_copy(
            update={"strategy": plain.strategy, "strategy_options": options}
        )
    told = RunConfig(
        name=run.name,
        task=PurePath(run.task).name,
        federation=federation,
        client=run.client,
        privacy=run.privacy,
    )
    return {SETTINGS: told.model_dump_json(exclude_defaults=True), INSTANCE: instance}
