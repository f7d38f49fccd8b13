"""Turns HTTP and TLS failures between a device and its server into typed exceptions."""

from __future__ import annotations

import json
import math
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

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
_MAX_DETAIL = 600
"""Most characters of a server's error text that are shown."""
_MAX_REFUSAL_BYTES = 1 << 14
_CERTIFICATE_ALERT = re.compile("ALERT_(UNKNOWN_CA|.*CERTIFICATE|ACCESS_DENIED)")


class Unreachable(ConnectionError):
    """The server cannot be reached or authenticated; retrying may succeed."""


class ServerUntrusted(Unreachable):
    """The peer does not prove to be the project's server; retrying may succeed."""


class DeviceRejected(Unreachable):
    """The server rejects this device, which it admitted before; retrying may succeed."""


class CertificateExpired(Unreachable):
    """The device's own certificate has expired; a renewed kit is used once it is installed."""


class NotActivated(ConnectionError):
    """The server does not know this process: it restarted, or another process replaced this one."""


class Busy(Exception):
    """The server is busy, and states when to retry."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


@contextmanager
def refusals(*, let_in: bool) -> Iterator[None]:
    """Turns HTTP errors inside the block into fedcore's exceptions.

    If the server has admitted this device before (``let_in``), a rejection is retryable:
    otherwise one server in error would stop every device until its owner restarts it.
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
            raise DeviceRejected(
                f"the server refuses this device, which it accepted before (HTTP {status}: "
                f"{detail})"
            ) from None
        raise kind(detail) from None
    except ValueError as error:  # the response is no protobuf, for example a proxy's page
        raise Unreachable(str(error)) from None
    except (FedcoreError, httpx.TransportError):
        raise
    except Exception as error:  # parsers of HTTP and protobuf, on malicious bytes
        said = f"{type(error).__name__}: {foreign(error, 200)}"
        raise Unreachable(f"cannot read the server's response ({said})") from None


def is_certificate_error(error: BaseException | None) -> bool:
    """Returns whether TLS failed because of a certificate, rather than the network."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        if isinstance(error, ssl.SSLError) and _CERTIFICATE_ALERT.search(str(error.reason)):
            return True
        error = error.__cause__ or error.__context__
    return False


def untrusted_text(unproven: Mapping[str, Exception]) -> str:
    """Returns a text about addresses whose peer does not prove to be the project's server."""
    failures = "; ".join(f"{server} ({error})" for server, error in unproven.items())
    return (
        f"{failures}: the peer there did not authenticate as this project's server, or refuses "
        "this device without authenticating"
    )


def _detail(response: httpx.Response) -> str:
    """Returns the server's error text, decoded as UTF-8.

    The response's charset is ignored: it can name any Python codec, and some decompress, some take
    quadratic time, some fail in odd ways.
    """
    raw = response.content
    try:
        if len(raw) > _MAX_REFUSAL_BYTES:
            raise ValueError("the body of the refusal is too long")
        return foreign(json.loads(raw.decode())["detail"], _MAX_DETAIL)
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the server answered HTTP {response.status_code}"


def _retry_after_s(response: httpx.Response) -> float:
    try:
        seconds = float(response.headers.get("retry-after", "1"))
    except ValueError:
        return 1.0
    return min(max(seconds, 0.05), 60.0) if math.isfinite(seconds) else 1.0


def not_reached(failed: Mapping[str, Exception], *, expires: datetime, admitted: bool) -> Exception:
    """Returns the error to raise when no address of a kit has worked.

    Args:
        failed: The failure of each address.
        expires: When the device's certificate expires.
        admitted: Whether a server has ever admitted this device.
    """
    failures = "; ".join(f"{server}: {type(one).__name__}: {one}" for server, one in failed.items())
    unproven = {server: one for server, one in failed.items() if is_certificate_error(one)}
    if datetime.now(UTC) > expires and (admitted or not unproven):
        # The server disconnects after the handshake, so the TLS error shows no reason.
        return CertificateExpired(
            f"this device's own certificate expired on {minute_text(expires)} UTC, so "
            "servers refuse it. Have the operator run `fedcore provision renew`, and install "
            "the new kit with `fedcore client install`; this process will pick it up "
            f"({failures})"
        )
    if not unproven:
        return Unreachable(failures)
    if admitted or len(unproven) < len(failed):
        return ServerUntrusted(
            f"{untrusted_text(unproven)}. This device keeps trying; if this persists, ask the "
            "operator to check the server's certificate and addresses"
        )
    return TrustError(
        f"connection: the two sides do not trust each other's certificates ({failures}). This "
        "device does not take part; a kit is valid for one project only, and is renewed with "
        "`fedcore provision renew`."
    )


def minute_text(moment: datetime) -> str:
    """Formats a time to the minute."""
    return f"{moment:%Y-%m-%d %H:%M}"
