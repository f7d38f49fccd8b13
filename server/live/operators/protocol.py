"""What somebody may ask of a server that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from fedcore.config.run import Section
from fedcore.crypto.certificates import MemberRole
from fedcore.errors import ConfigError, ResourceError
from fedcore.observability.faults import first_fault

MAX_REQUEST_BYTES = 4096

Verb = Literal["status", "rounds", "devices", "pause", "resume", "stop", "drain", "backup"]
LOOKING: frozenset[Verb] = frozenset({"status", "rounds", "devices"})
"""What changes nothing, so that viewers may ask it."""


class OperatorRequest(Section):
    """What somebody asks of a server."""

    verb: Verb
    device: str | None = None
    """Whom to drain."""
    undo: bool = False
    """Whether a drained device is to be selected again."""
    file: str | None = None
    """Where a backup goes, on the server's machine."""


@dataclass(frozen=True)
class Asker:
    """Who asks."""

    by: str
    """As the audit log names it."""
    role: MemberRole
    local: bool
    """Whether it asks on the server's own machine."""


def parse_request(raw: bytes) -> OperatorRequest:
    """Reads a request.

    Raises:
        ConfigError: it is none.
    """
    try:
        return OperatorRequest.model_validate_json(raw)
    except ValidationError as error:
        raise ConfigError(
            f"request: {first_fault(error)}. Nothing was done; ask with the server's own version "
            "of fedcore."
        ) from None


@contextmanager
def named(request: OperatorRequest) -> Iterator[None]:
    """Turns what the system says of a request into an error that can be answered.

    Raises:
        ResourceError: it cannot be done.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{request.verb}: {request.file or 'the server'}: it could not be done ({error}). See "
            "that the place is there and writable for the server's user, and ask again."
        ) from error
