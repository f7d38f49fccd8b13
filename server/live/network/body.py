"""A large body on its way through TLS: decrypted in memory that all connections share.

By asyncio's own way a connection reads 64 KiB at a time into memory of its own, makes an object of
each TLS record, another of all of them, and has a parser copy that once more. A body that goes
elsewhere as it comes in needs none of this: more of it is read at a time, and it is touched while
the processor's cache still holds it.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol, SSLProtocolState
from collections.abc import Callable
from typing import Any

_READ_BYTES = 2**18
_FED_BYTES = 2**16
"""So much is given to OpenSSL at a time, whose buffer stays as large as it once was."""
_RECORD_BYTES = 2**14  # most of a TLS record, decrypted
_AGAIN = (ssl.SSLWantReadError, ssl.SSLSyscallError)

Take = Callable[[memoryview], bool]
"""Takes a piece, which is overwritten once it returns; says whether more of the body is to come."""


class Buffers:
    """What one piece passes through at a time. Belongs to one event loop, whatever connections."""

    def __init__(self) -> None:
        self.encrypted = memoryview(bytearray(_READ_BYTES))
        self.plain = memoryview(bytearray(_READ_BYTES + _RECORD_BYTES))


class BodyReader(asyncio.BufferedProtocol):
    """Stands between a socket and asyncio's TLS until a body has come in.

    Whatever is not plain reading it leaves to asyncio's TLS, whose place it gives back then: the
    end of the connection, an error, a peer that is not to be read from for now.
    """

    def __init__(self, tls: Any, buffers: Buffers, take: Take) -> None:
        """Takes the place of ``tls``, an `SSLProtocol`: its fields are no part of its interface."""
        self._tls = tls
        self._raw = tls._transport
        self._buffers = buffers
        self._take = take
        self._raw.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the socket's next bytes go."""
        return self._buffers.encrypted

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypts what has come, and hands it on."""
        tls, encrypted = self._tls, self._buffers.encrypted[:nbytes]
        fed, size, goes_on = 0, 0, True
        while goes_on and fed < nbytes and self._reads():
            tls._incoming.write(encrypted[fed : fed + _FED_BYTES])
            fed = min(nbytes, fed + _FED_BYTES)
            size, goes_on = self._decrypted(size)
        if size:
            goes_on = self._take(self._buffers.plain[:size]) and goes_on
        if not goes_on or not self._reads():
            self._give_back(encrypted[fed:])
        elif tls._outgoing.pending:  # an answer to what TLS itself was asked
            tls._process_outgoing()

    def _reads(self) -> bool:
        return self._tls._state is SSLProtocolState.WRAPPED and not self._tls._app_reading_paused

    def _decrypted(self, size: int) -> tuple[int, bool]:
        """Decrypts all whole records, behind the first ``size`` bytes; how many there are then.

        And whether that may go on: not where the body is over, or TLS itself ends.
        """
        plain, read = self._buffers.plain, self._tls._sslobj.read
        try:
            while True:
                if len(plain) - size < _RECORD_BYTES:
                    if not self._take(plain[:size]):
                        return 0, False
                    size = 0
                count = read(len(plain) - size, plain[size:])
                if not count:
                    return size, False
                size += count
        except _AGAIN:
            return size, True
        except ssl.SSLError:
            return size, False

    def _give_back(self, encrypted: memoryview) -> None:
        """Leaves the rest to asyncio's TLS, which meets there, too, what ended the reading here."""
        tls = self._tls
        self._raw.set_protocol(tls)
        while True:
            room = tls.get_buffer(-1)
            part = encrypted[: len(room)]
            room[: len(part)] = part
            tls.buffer_updated(len(part))
            encrypted = encrypted[len(part) :]
            if not encrypted:
                return

    def eof_received(self) -> bool | None:
        """The peer has hung up."""
        self._raw.set_protocol(self._tls)
        kept: bool | None = self._tls.eof_received()
        return kept

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._tls.connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer does not read what it was sent."""
        self._tls.pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self._tls.resume_writing()


def read_body(transport: asyncio.Transport, buffers: Buffers, take: Take) -> None:
    """Has what comes over a connection go to ``take`` for now, where its TLS is asyncio's."""
    tls = getattr(transport, "_ssl_protocol", None)
    if isinstance(tls, SSLProtocol) and isinstance(
        getattr(tls, "_transport", None), asyncio.Transport
    ):
        BodyReader(tls, buffers, take)
