"""Types of a deployment: `Deployment`, the operator's options, and `LiveRun`, the opened run."""

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
from server.delivery.serve import DeliveryAddress
from server.live.inputs import Inputs
from server.live.journal.journal import Journal
from server.live.network.serve import Address
from server.live.operators.control import Control


@dataclass(frozen=True)
class Deployment:
    """An operator's options for a deployment, as given to ``fedcore server start``."""

    run: RunConfig
    identity: Path
    """Folder with the server's key, certificate and member list."""
    host: str
    port: int | None
    """Port for devices; None for the one in the server's kit."""
    wake_port: int | None
    """Port of the wake-up streams; None for ``port`` + 1."""
    runs: Path
    """Folder that contains one folder per run."""
    json: bool
    """Whether events are printed as JSON lines."""
    resume: bool = False
    """Resume an unfinished run; start a new one if there is none."""
    fresh: bool = False
    """Start a new run, and drop an unfinished one."""
    delivery_port: int | None = None
    """Port on which devices get releases of the run's repository; None to deliver none."""

    def address(self, identity: ServerIdentity) -> Address:
        """Returns the address to listen on.

        Raises:
            ConfigError: ``port`` is the highest port, and ``wake_port`` is not set.
        """
        port = identity.port if self.port is None else self.port
        if self.wake_port is None and port == 2**16 - 1:
            raise ConfigError(
                f"server: it listens on port {port}, and there is no next port on which to wake "
                "devices. Nothing was started; choose a port with --wake-port."
            )
        wake_port = (port + 1 if port else 0) if self.wake_port is None else self.wake_port
        return Address(self.host, port, wake_port)

    @property
    def delivery(self) -> DeliveryAddress | None:
        """Where devices get releases; None if the run has no repository, or no port is set."""
        if self.delivery_port is None or self.run.release.repository is None:
            return None
        return DeliveryAddress(self.host, self.delivery_port)


@dataclass(frozen=True)
class LiveRun:
    """A run whose folder and journal are open, with everything that serving it requires."""

    run: RunConfig
    inputs: Inputs
    identity: ServerIdentity
    address: Address
    hello: Hello
    """Versions that devices must have."""
    settings: Mapping[str, str]
    """The run's settings that are sent to devices, see `server.live.rounds.settings`."""
    folder: Path
    """The run's folder, for results."""
    journal: Journal
    control: Control
    """Serves operators' requests."""
    emit: Sink
    """Callback with each event."""
    randomness: Randomness
    """Source of the server's randomness."""
    delivery: DeliveryAddress | None = None
    """Where devices get releases while the rounds run; None if they don't."""

    @property
    def spool(self) -> Path:
        """Folder for uploads while they arrive."""
        return self.folder / "incoming"

    def waiting(self, text: str) -> None:
        """Shows, as transient progress, what a round waits for."""
        self.emit(StageAdvanced("rounds", self.journal.round, text))
