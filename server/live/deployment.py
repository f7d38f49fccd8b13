"""A run over devices: what an operator asks for, and what is open while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcore.config.run import RunConfig
from fedcore.crypto.roster import ServerIdentity
from fedcore.errors import ConfigError
from fedcore.observability.events import Sink, StageAdvanced
from fedcore.rpc.hello import Hello
from fedcore.seeds import Randomness
from server.live.inputs import Inputs
from server.live.journal.journal import Journal
from server.live.network.serve import Address
from server.live.operators.control import Control


@dataclass(frozen=True)
class Deployment:
    """What an operator asks for."""

    run: RunConfig
    identity: Path
    host: str
    port: int | None
    """The one that the server's certificate was made with, when None."""
    wake_port: int | None
    """The one after ``port``, when None."""
    runs: Path
    json: bool
    resume: bool = False
    """Go on with a run that did not end, where there is one."""
    fresh: bool = False
    """Begin again, whatever there is."""

    def address(self, identity: ServerIdentity) -> Address:
        """Where to listen.

        Raises:
            ConfigError: there is no port after ``port``, and no other is named.
        """
        port = identity.port if self.port is None else self.port
        if self.wake_port is None and port == 2**16 - 1:
            raise ConfigError(
                f"server: it listens on port {port}, and devices are woken on the port after, "
                "which there is none of. Nothing was started; name another with --wake-port."
            )
        wake_port = (port + 1 if port else 0) if self.wake_port is None else self.wake_port
        return Address(self.host, port, wake_port)


@dataclass(frozen=True)
class LiveRun:
    """A run whose folder and journal are open."""

    run: RunConfig
    inputs: Inputs
    identity: ServerIdentity
    address: Address
    hello: Hello
    """The versions that devices must have."""
    settings: Mapping[str, str]
    """What devices are told of the run."""
    folder: Path
    """Where results go."""
    journal: Journal
    control: Control
    """Steers it."""
    emit: Sink
    """Called with each event."""
    randomness: Randomness
    """Of the server."""

    @property
    def spool(self) -> Path:
        """Folder of what devices send, while it is on its way."""
        return self.folder / "incoming"

    def waiting(self, text: str) -> None:
        """Shows what a round waits for; it is progress, and kept nowhere."""
        self.emit(StageAdvanced("rounds", self.journal.round, text))
