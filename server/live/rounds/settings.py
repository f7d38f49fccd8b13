"""The part of a run's configuration that the server sends to devices."""

from __future__ import annotations

from pathlib import PurePath

from fedcore.config.run import FederationConfig, RunConfig
from fedcore.rpc.hello import INSTANCE, SETTINGS
from server.rounds.strategies.own import names_user_strategy


def device_settings(run: RunConfig, *, instance: str) -> dict[str, str]:
    """Returns the settings that local training depends on, as the hello protocol transfers them.

    Leaves out paths, a custom strategy, the server's keys and the seed: devices draw their own
    noise. ``instance`` is constant when a run is resumed and new when a run starts afresh: a
    device sends a finished update again in the first case, and trains again in the second.
    """
    federation = run.federation.model_copy(update={"initial": None})
    if names_user_strategy(
        federation.strategy
    ):  # only the server has its file; clients do not need it
        plain = FederationConfig()
        options = plain.strategy_options
        federation = federation.model_copy(
            update={"strategy": plain.strategy, "strategy_options": options}
        )
    settings = RunConfig(
        name=run.name,
        task=PurePath(run.task).name,
        federation=federation,
        client=run.client,
        privacy=run.privacy,
    )
    return {SETTINGS: settings.model_dump_json(exclude_defaults=True), INSTANCE: instance}
