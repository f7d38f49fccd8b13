"""A running server's administration as an object: `ServerClient`.

It is part of the Python API; the operators' verbs of ``fedcore server`` call the same. Imports
neither torch nor Flower.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedcore.crypto.kit import load_kit
from fedcore.errors import DataError
from fedcore.observability.faults import first_fault
from server.live.operators.client import ask_local, ask_remote
from server.live.operators.protocol import BackedUp, Verb
from server.records import RoundRecord

Place = str | PathLike[str]
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class DeviceCounts:
    """Number of a project's devices."""

    members: int
    """Devices in force."""
    there: int
    """Devices that are connected."""
    drained: int
    """Devices that rounds leave out."""


@dataclass(frozen=True)
class RosterState:
    """The member list that a server has in force."""

    version: int
    damage: str | None
    """Why a newer list could not be read; None if there is none."""


@dataclass(frozen=True)
class ServerStatus:
    """The state of a running server, from `fedcore.ServerClient.status`.

    Example::

        status = fedcore.ServerClient("authority/server").status()
        status.state, status.round, status.rounds, status.devices.there
    """

    run: str
    state: str
    """``waiting``, ``running``, ``pausing``, ``paused``, ``stopping``, ``finishing``, ``ended``."""
    stage: str | None
    """The step after the rounds, such as ``fine-tuning``; None during the rounds."""
    waits: str | None
    """What the round waits for; None where it waits for nothing, or not for long."""
    round: int
    """Number of the last completed round; 0 before the first."""
    rounds: int
    """Number of rounds in all."""
    last: RoundRecord | None
    """The last completed round."""
    notes: tuple[str, ...]
    devices: DeviceCounts
    project: str
    listens: str | None
    """Address for devices, ``HOST:PORT``; None once devices are no longer served."""
    wakes: int | None
    """Port on which devices are woken."""
    certificate_not_after: datetime
    """When the server's certificate expires, UTC."""
    roster: RosterState
    up_s: float
    version: str
    """The server's version of fedcore."""
    left: dict[str, str] = field(default_factory=dict)
    """Why devices left, or why their process before ended, by name; of 20 devices at most."""
    training: str | None = None
    """How far a training in the cloud has come, in words; None where none is under way."""


@dataclass(frozen=True)
class DeviceStatus:
    """One device of a project as its server sees it, from `fedcore.ServerClient.devices`.

    Example::

        away = [one.name for one in client.devices() if not one.there]
    """

    name: str
    node_id: int
    """The device's number in Flower, which follows from its key."""
    there: bool
    """Whether it is connected."""
    awake: bool
    """Whether the server can wake it; otherwise it polls."""
    owes: bool
    """Whether it owes a reply, and is left out until it calls."""
    drained: bool
    """Whether rounds leave it out."""
    num_examples: int | None
    """Fixed weight of its updates; None for the same as other devices."""
    certificate_not_after: datetime
    """When its certificate expires, UTC."""
    reason: str | None = None
    """Why it left, or why its process before ended; None if nothing is known."""


@dataclass(frozen=True)
class EvaluatedOnDevices:
    """What connected devices measured of a model."""

    evaluation: dict[str, Any]
    """Metrics, their spread over devices, the worst devices, and values by device, as in the JSON
    of ``fedcore evaluate``; ``after_round`` is the round after which they were measured."""
    text: str
    """The same as a table."""
    file: str
    """The file on the server that keeps it."""


@dataclass(frozen=True)
class RunState:
    """A run and its state, after an operator's request."""

    run: str
    state: str
    """See `ServerStatus.state`."""


@dataclass(frozen=True)
class ServerClient:
    """Controls and inspects a running server, as its operator or a viewer.

    Each call opens a connection of its own: to the server's socket on this machine, or with a kit
    over the network. An error with which the server answers is raised here.

    Example::

        client = fedcore.ServerClient(kit="anna")  # over the network, with a person's kit
        client.status().state, [one.name for one in client.devices() if one.there]
        client.pause()
        client.drain("edge-017")
        client.resume()

    Attributes:
        identity: The server's folder, on the server's own machine.
        kit: Folder of an operator's or a viewer's kit, to connect over the network instead.
    """

    identity: Place = "authority/server"
    kit: Place | None = None

    def status(self) -> ServerStatus:
        """Returns the state of the server and its run.

        Raises:
            ResourceError: no server answers, or this user may not ask.
            TrustError: the server rejected the certificate.
            DataError: the folder is not a server's, or the answer cannot be read.
        """
        return self._read(ServerStatus, self.ask("status"))

    def rounds(self) -> tuple[RoundRecord, ...]:
        """Returns the completed rounds, the last 1000; raises as `status`."""
        return self._read(tuple[RoundRecord, ...], self.ask("rounds").get("rounds"))

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Returns the project's devices, sorted by name; raises as `status`."""
        return self._read(tuple[DeviceStatus, ...], self.ask("devices").get("devices"))

    def pause(self) -> RunState:
        """Pauses the run after the current round.

        Raises:
            ConfigError: the run has ended, or its rounds have.
            FedcoreError: the request cannot be sent, see `status`, or only operators may do this.
        """
        return self._read(RunState, self.ask("pause"))

    def resume(self) -> RunState:
        """Continues after a pause; raises as `pause`."""
        return self._read(RunState, self.ask("resume"))

    def stop(self) -> RunState:
        """Stops the server after the current round, or during the steps after the rounds.

        The run can be resumed. Raises as `pause`.
        """
        return self._read(RunState, self.ask("stop"))

    def drain(self, device: str, *, undo: bool = False) -> bool:
        """Leaves a device out of further rounds, or with ``undo`` lets them select it again.

        Returns:
            Whether the device is left out now.

        Raises:
            ConfigError: there is no such device, or too few would remain for a round.
            FedcoreError: the request cannot be sent, see `status`, or only operators may do this.
        """
        return self._read(bool, self.ask("drain", device=device, undo=undo).get("drained"))

    def backup(self, file: Place) -> BackedUp:
        """Writes the run's folder to a new tar file, between two rounds; waits for that.

        Works on the server's own machine only.

        Raises:
            ConfigError: the file exists, or this is not the server's machine.
            FedcoreError: the backup failed, or the request cannot be sent, see `status`.
        """
        return self._read(BackedUp, self.ask("backup", file=str(Path(file).absolute())))

    def evaluate(self, model: Place) -> EvaluatedOnDevices:
        """Has the connected devices evaluate a model on the data that they hold back.

        It waits for the end of the round that is under way. Works on the server's own machine only.

        Args:
            model: A checkpoint of the run's model, such as ``global.safetensors``.

        Raises:
            ConfigError: the run's devices hold no data back, or this is not the server's machine.
            DataError: the file is no checkpoint of the run's model.
            RoundFailed: no device evaluated it.
            FedcoreError: the rounds ended meanwhile, or the request cannot be sent, see `status`.
        """
        answer = self.ask("evaluate", file=str(Path(model).absolute()))
        return self._read(EvaluatedOnDevices, answer)

    def ask(self, verb: Verb, **fields: Any) -> dict[str, Any]:
        """Sends a request, and returns the server's answer as it is in JSON.

        Args:
            verb: What is asked for.
            fields: Further fields of a `server.live.operators.protocol.OperatorRequest`.
        """
        request = {"verb": verb, **fields}
        if self.kit is None:
            return ask_local(Path(self.identity), request)
        return ask_remote(load_kit(Path(self.kit)), request)

    def _read(self, kind: type[_Answer], answer: object) -> _Answer:
        try:
            return TypeAdapter(kind).validate_python(answer)
        except ValidationError as error:
            raise DataError(
                f"{self.kit or self.identity}: the server's answer is not of a known form "
                f"({first_fault(error)}). Use the same version of fedcore as the server."
            ) from None
