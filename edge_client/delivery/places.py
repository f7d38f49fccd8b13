"""Where a device gets releases from: a folder, a web server, or the project's server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.delivery.https import https_source, is_url
from edge_client.delivery.source import Source, folder_source
from fedcore.artifacts.rollout import DeviceIdentity
from fedcore.crypto.keys import fingerprint
from fedcore.crypto.kit import load_kit
from fedcore.errors import ConfigError
from fedcore.rpc.tls import require_tls_1_3, silence_grpc_core

if TYPE_CHECKING:
    from edge_client.delivery.network import DeliveryLink


@dataclass(frozen=True)
class ReleasePlace:
    """A place of releases, as a user names it: a repository, or a server with this device's kit."""

    repository: str | None = None
    """A folder, or the ``https`` address of one."""
    server: str | None = None
    """``HOST`` or ``HOST:PORT`` of the project's server."""
    kit: Path | None = None
    """The folder of this device's kit: for ``server``, and to take part in trials."""

    def check(self) -> None:
        """Checks that it names one place.

        Raises:
            ConfigError: it names none or two, or a server without a kit.
        """
        if (self.repository is None) == (self.server is None):
            raise ConfigError(
                "device: expected --repository, or --server with --kit, and not both. Nothing was "
                "fetched; name the one place to get releases from."
            )
        if self.kit is None and self.server is not None:
            raise ConfigError(
                "device: --server needs --kit: the kit is the identity with which this device "
                "connects to its server. Nothing was fetched; give both."
            )

    def identity(self) -> DeviceIdentity | None:
        """Returns the identity by which this device belongs to a channel; None without a kit.

        Raises:
            DataError: the kit is missing or unreadable.
            CertificateRefused: the kit is not valid.
        """
        if self.kit is None:
            return None
        kit = load_kit(self.kit)
        return DeviceIdentity(kit.name, fingerprint(kit.public))


@contextmanager
def opened_place(place: ReleasePlace, stop: threading.Event | None = None) -> Iterator[Source]:
    """Opens a place of releases; yields a source for updates.

    Args:
        place: The place.
        stop: Set to end waits for a server early.

    Raises:
        ConfigError: the place, or the server's address, is not valid.
        DataError: there is no repository, or no kit.
        CertificateRefused: the kit is not valid, or not that of a device.
        ResourceError: gRPC was imported before its TLS could be limited to version 1.3.
    """
    place.check()
    if place.repository is not None:
        if is_url(place.repository):
            yield https_source(place.repository, stop=stop)
        else:
            yield folder_source(Path(place.repository))
        return
    with linked(place, stop) as link:
        yield link.source


@contextmanager
def linked(place: ReleasePlace, stop: threading.Event | None = None) -> Iterator[DeliveryLink]:
    """Opens a link to the server that a place names, see `opened_place`."""
    assert place.server is not None
    assert place.kit is not None
    require_tls_1_3()
    silence_grpc_core()
    from edge_client.delivery.network import DeliveryLink, endpoint_of

    with DeliveryLink(place.kit, endpoint_of(place.kit, place.server), stop=stop) as link:
        yield link
