"""A run that a server asks this device to take part in: its settings, app, state and ledger."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from edge_client.agent.policy import hours_left_s
from edge_client.agent.request_limits import message_limit_bytes, reason_to_stop
from edge_client.agent.wake import Signals, TokenBucket
from edge_client.device_folder import DeviceFolder
from edge_client.ledger.ledger import DeviceLedger, drop_idle, ledger_of
from fedcore.client_app import DurableLedger, client_app
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.crypto.kit import Kit
from fedcore.errors import ConfigError, TooManyRuns
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.identity import assume_identity
from fedcore.observability.faults import first_fault
from fedcore.privacy.ledger import ledger_in
from fedcore.rpc.hello import SETTINGS
from fedcore.seeds import Randomness, SystemEntropy
from fedcore.task.definition import Task, data_folder
from fedcore.training.bounds import bounds_of
from fedcore.training.mods import client_mods
from fedcore.updates.seal import run_digest

NEW_RUN_S, NEW_RUN_BURST = 900.0, 64
"""Rate limit on private runs without a charge so far: seconds per run in the long run, and burst
size. The ledger keeps every run forever: without a limit, new runs would fill it for good."""


@dataclass(frozen=True)
class DeviceSetup:
    """Everything that a training session needs: identity, task, owner's policy and folder."""

    kit: Kit
    task: Task
    task_path: Path
    owner: OwnerPolicy
    folder: DeviceFolder
    randomness: Randomness = field(default_factory=SystemEntropy)
    instance: str = field(default_factory=lambda: secrets.token_hex(16))
    """Random name by which the server recognizes this session."""
    ended: str = ""
    """Why this device's process before ended, for the server; empty if as usual."""
    passed: Callable[[int], None] | None = None
    """Callback after each transfer with its bytes; may block to limit bandwidth."""
    between_rounds: Callable[[], None] | None = None
    """Callback when no message is left to answer, after the run's model is released."""
    new_runs: TokenBucket = field(default_factory=lambda: TokenBucket(NEW_RUN_S, NEW_RUN_BURST))
    """Rate limit on private runs without a charge so far."""


@dataclass(frozen=True)
class OpenRun:
    """An open run: the app with its model and data, and the privacy ledger."""

    name: str
    digest: str
    """Digest of the run's settings and instance; a stored reply is reused only if it matches."""
    app: ClientApp
    context: Context
    ledger: DeviceLedger | None
    """None in a run without differential privacy."""
    durable: DurableLedger | None
    """None in a run without differential privacy."""
    max_bytes: int
    """Upper bound on the size of one message."""


def open_run(device: DeviceSetup, link: FleetLink, signals: Signals, run_id: int) -> OpenRun:
    """Builds the app for a run, once: model, data and accelerator stay loaded between rounds."""
    settings = link.settings(run_id)
    config = read_settings(settings.get(SETTINGS, ""))
    assume_identity(run_id)
    device.folder.drop_local(before=config.name)
    state, ledger, durable = device.folder.state(config.name), None, None
    data = device.owner.data_folder or data_folder()
    if config.private:
        ledger = ledger_of(device.folder, device.kit, device.owner, config, data)
        if not (ledger_in(state).charges or device.new_runs.try_acquire()):
            raise TooManyRuns(
                f"run {config.name!r} is new, but this server has already started "
                f"{NEW_RUN_BURST} new private runs on this device, and one more every "
                f"{NEW_RUN_S / 60:.0f} minutes is allowed, so that a server cannot fill this "
                "device's ledger. Nothing was charged; the device will take part in this run if "
                "it is asked later."
            )
        durable = DurableLedger(ledger.open(state), partial(ledger.commit, state))
    else:
        drop_idle(device.folder, before=config.name)
    context = Context(
        run_id=run_id,
        node_id=link.node_id,
        node_config={"client": device.kit.name},
        state=state,
        run_config={},
    )
    app = client_app(
        device.task,
        config,
        owner=device.owner.on(data),
        randomness=device.randomness,
        mods=client_mods(config.federation.strategy),
        durable=durable,
        bounds=lambda: bounds_of(
            device.owner,
            deadline_s=config.federation.deadline_s,
            hours_left_s=hours_left_s(device.owner),
            stopped=lambda: reason_to_stop(signals),
        ),
    )
    max_bytes = message_limit_bytes(device.task, config, device.owner)
    return OpenRun(config.name, run_digest(settings), app, context, ledger, durable, max_bytes)


def read_settings(text: str) -> RunConfig:
    """Parses the settings of a run, JSON from the server.

    Raises:
        ConfigError: this version of fedcore cannot read them.
    """
    try:
        return RunConfig.model_validate_json(text.encode(errors="replace"))
    except ValidationError as error:
        raise ConfigError(
            f"run: cannot read the server's settings ({first_fault(error)}). This device does "
            "not take part; install the server's version of fedcore on it."
        ) from None
