"""What goes wrong between a device and its server, by what HTTP and TLS say of it."""

from __future__ import annotations

import json
import math
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

from fedcore.errors import DataError, DeviceError, FedcoreError, InvalidUpdate, TrustError
from fedcore.observability.foreign import foreign

_REFUSED: dict[int, type[FedcoreError]] = {
    400: DataError,
    403: TrustError,
    404: DeviceError,
    409: InvalidUpdate,
    412: DeviceError,
    413: InvalidUpdate,
}
_MOST_DETAIL = 600
"""Characters of a server's words that are shown."""
_MOST_REFUSAL_BYTES = 1 << 14
_CERTIFICATE_ALERT = re.compile("ALERT_(UNKNOWN_CA|.*CERTIFICATE|ACCESS_DENIED)")


class Unreachable(ConnectionError):
    """The server cannot be reached, or is not itself; it may be again."""


class Unproven(Unreachable):
    """What answers is not shown to be the project's server; the server may be back there later."""


class Refused(Unreachable):
    """The server lets this device in no more, and did before; it may again."""


class OwnExpired(Unreachable):
    """The device's own certificate has run out; a renewed kit is taken up as it comes."""


class NotActivated(ConnectionError):
    """The server does not know this process: it was restarted, or another one took its place."""


class Busy(Exception):
    """The server is there, and says when to come again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


@contextmanager
def refusals(*, let_in: bool) -> Iterator[None]:
    """Turns what HTTP says into the errors of this project.

    Where the server has ``let_in`` this device before, no refusal is one for good: a server that
    was misled, or is another's for an hour, would end every device until somebody starts it again.
    """
    try:
        yield
    except httpx.HTTPStatusError as error:
        status, detail = error.response.status_code, _detail(error.response)
        if status in (429, 503):
            raise Busy(_retry_after_s(error.response)) from None
        if status == 401:
            raise NotActivated(detail) from None
        kind = _REFUSED.get(status)
        if kind is None:
            raise Unreachable(f"HTTP {status}: {detail}") from None
        if let_in and kind is not InvalidUpdate:
            raise Refused(
                f"the server refuses this device, which it let in before (HTTP {status}: {detail})"
            ) from None
        raise kind(detail) from None
    except ValueError as error:  # an answer that is no protobuf: a proxy's page, say
        raise Unreachable(str(error)) from None
    except (FedcoreError, httpx.TransportError):
        raise
    except Exception as error:  # HTTP's and protobuf's readers, on bytes that were made up
        said = f"{type(error).__name__}: {foreign(error, 200)}"
        raise Unreachable(f"an answer of the server cannot be read ({said})") from None


def is_distrust(error: BaseException | None) -> bool:
    """Whether TLS failed over a certificate, and not over the network."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        if isinstance(error, ssl.SSLError) and _CERTIFICATE_ALERT.search(str(error.reason)):
            return True
        error = error.__cause__ or error.__context__
    return False


def doubt(unproven: Mapping[str, Exception]) -> str:
    """What to tell of addresses where whoever answers is not known to be the server."""
    told = "; ".join(f"{server} ({error})" for server, error in unproven.items())
    return (
        f"{told}: what answers there does not prove to be this project's server, or refuses this "
        "device without proof"
    )


def _detail(response: httpx.Response) -> str:
    """What the server says of it, in UTF-8: a charset that it names would be any codec of Python's.

    Some of those decompress, some take time with the square of the length, some fail oddly.
    """
    raw = response.content
    try:
        if len(raw) > _MOST_REFUSAL_BYTES:
            raise ValueError("no refusal is so long")
        return foreign(json.loads(raw.decode())["detail"], _MOST_DETAIL)
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the server answered HTTP {response.status_code}"


def _retry_after_s(response: httpx.Response) -> float:
    try:
        seconds = float(response.headers.get("retry-after", "1"))
    except ValueError:
        return 1.0
    return min(max(seconds, 0.05), 60.0) if math.isfinite(seconds) else 1.0
