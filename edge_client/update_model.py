"""Python interface to updates of a device's models. Imports neither torch nor Flower."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from edge_client.delivery.places import ReleasePlace, opened_place
from edge_client.delivery.roots import MAX_ROOT_BYTES
from edge_client.delivery.update import UpdateResult, update
from edge_client.inference.process import ModelLimits
from fedcore.config.run import Serving
from fedcore.files import read_bytes


def update_model(
    store: str | PathLike[str],
    name: str,
    *,
    repository: str | PathLike[str] | None = None,
    server: str | None = None,
    kit: str | PathLike[str] | None = None,
    root: str | PathLike[str] | None = None,
    threads: int = Serving().threads,
    limits: ModelLimits | None = None,
    again: bool = False,
) -> UpdateResult:
    """Installs the current release of a model: fetched, verified, self-tested and activated.

    Needs only the base package: imports neither torch nor Flower.

    Guarantee:
        If any step fails, the version that served before continues to serve.

    Example::

        done = fedcore.update_model(
            "device-store", "digits", repository="releases", root="keys/root.json"
        )
        done.version, done.changed
        model = fedcore.open_model("device-store", "digits")

    Args:
        store: The folder of the device's installed models; created if missing.
        name: The model's name.
        repository: The folder of the signed repository, or its ``https`` address; or else
            ``server`` and ``kit``.
        server: ``HOST`` or ``HOST:PORT`` of the project's server, which delivers releases.
        kit: The folder of this device's kit, the identity for ``server``.
        root: The ``root.json`` to trust, received over a trusted channel. The first update needs
            it, and pins it in the store.
        threads: Threads of one inference in the self-test.
        limits: Time and memory for the self-test; when None, 120 seconds, and memory by the size of
            the model.
        again: Whether to install the newest version even if this device returned from it before.

    Returns:
        The version that is active now, whether it changed, and what is wrong with the device's
        clock or the version before.

    Raises:
        ConfigError: the name is not valid, no root is trusted yet, or not just one place is named.
        TrustError: a signature, digest or version is not acceptable; or the server or the kit is
            refused.
        DataError: the repository, the root, the kit or the store is incomplete or damaged;
            `RepositoryUnreachable` if the server does not answer.
        SelfTestFailed: the model answers differently here, cannot run, or exceeds its limits.
        DeviceError: another update of this store is running.
        ResourceError: the store cannot be written, or (`DiskFull`) has no room.
    """
    trusted = read_root(root)
    place = ReleasePlace(
        None if repository is None else os.fspath(repository),
        server,
        None if kit is None else Path(kit),
    )
    with opened_place(place) as source:
        return update(
            source,
            store=Path(store),
            model=name,
            root=trusted,
            threads=threads,
            limits=limits,
            respect=() if again else ("returned",),
            identity=place.identity(),
        )


def read_root(path: str | PathLike[str] | None) -> bytes | None:
    """Reads the root that an owner gives; None if none is given.

    Raises:
        DataError: the file is missing, unreadable or too large.
    """
    if path is None:
        return None
    return read_bytes(Path(path), max_bytes=MAX_ROOT_BYTES, what="a root")
