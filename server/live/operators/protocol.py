"""Format of the requests that operators and viewers send to a running server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from fedcore.config.section import Section
from fedcore.crypto.certificates import MemberRole
from fedcore.errors import ConfigError, ResourceError
from fedcore.observability.faults import first_fault

MAX_REQUEST_BYTES = 4096

Verb = Literal[
    "status", "rounds", "devices", "pause", "resume", "stop", "drain", "backup", "evaluate"
]
READING: frozenset[Verb] = frozenset({"status", "rounds", "devices"})
"""Read-only verbs, which viewers may use, too."""


class OperatorRequest(Section):
    """A request of an operator or a viewer, sent as a JSON object."""

    verb: Verb
    device: str | None = None
    """Name of the device to drain."""
    undo: bool = False
    """Whether to select a drained device again."""
    file: str | None = None
    """Absolute path, on the server's machine, of the backup to write or the model to evaluate."""


@dataclass(frozen=True)
class Requester:
    """The authenticated sender of a request."""

    by: str
    """The sender's name in the audit log."""
    role: MemberRole
    local: bool
    """Whether the request came from the server's own machine."""


@dataclass(frozen=True)
class BackedUp:
    """A backup of a run's folder, from `fedcore.ServerClient.backup`.

    Example::

        done = fedcore.ServerClient("authority/server").backup("orchard.tar")
        done.file, done.bytes
    """

    file: str
    """Absolute path, on the server's machine."""
    files: int
    """Number of files in it."""
    bytes: int
    created: str
    """Time of the backup, UTC, ISO 8601."""


def parse_request(raw: bytes) -> OperatorRequest:
    """Parses and validates a request.

    Raises:
        ConfigError: ``raw`` is not a valid request.
    """
    try:
        return OperatorRequest.model_validate_json(raw)
    except ValidationError as error:
        raise ConfigError(
            f"request: {first_fault(error)}. Nothing was done; use the same version of fedcore "
            "as the server."
        ) from None


@contextmanager
def named(request: OperatorRequest) -> Iterator[None]:
    """Context manager that turns errors of the operating system into a `ResourceError`.

    Raises:
        ResourceError: the request cannot be carried out; the message names it.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{request.verb}: {request.file or 'the server'}: the request failed ({error}). "
            "Check that the place exists and is writable for the server's user, and try again."
        ) from error
