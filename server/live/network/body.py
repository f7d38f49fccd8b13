"""Fast path for large request bodies over TLS: decrypts into buffers that all connections share.

asyncio reads 64 KiB at a time into a buffer per connection, creates a bytes object per TLS record,
joins them, and the HTTP parser copies the result again. A body that is streamed to its destination
needs none of these copies. `read_body` reads larger blocks and passes them on while they are still
in the processor's cache.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol, SSLProtocolState
from collections.abc import Callable
from typing import Any

_READ_BYTES = 2**20
"""Bytes read from a socket at a time. The event loop's own work for each block takes a larger share
with smaller ones; this and the decrypted block together are as large as many cores' L2 cache."""
_FED_BYTES = 2**16
"""Bytes passed to OpenSSL at a time; small, as OpenSSL's buffer grows and never shrinks."""
_RECORD_BYTES = 2**14  # maximum size of a TLS record, decrypted
_NEEDS_MORE = (ssl.SSLWantReadError, ssl.SSLSyscallError)

Take = Callable[[memoryview], bool]
"""Consumer of a piece, whose memory is reused after it returns; returns whether more must follow.
"""


class Buffers:
    """Buffers for encrypted and decrypted data, shared by all connections of one event loop."""

    def __init__(self) -> None:
        self.encrypted = memoryview(bytearray(_READ_BYTES))
        self.plain = memoryview(bytearray(_READ_BYTES + _RECORD_BYTES))


class BodyReader(asyncio.BufferedProtocol):
    """A protocol that temporarily replaces asyncio's TLS protocol until a body has arrived.

    It handles only plain reading. On anything else (the end of the connection, an error, paused
    reading) it reinstalls asyncio's TLS protocol, which handles that.
    """

    def __init__(self, tls: Any, buffers: Buffers, take: Take) -> None:
        """Replaces ``tls``, an `SSLProtocol`, on its transport; uses its private fields."""
        self._tls = tls
        self._raw = tls._transport
        self._buffers = buffers
        self._take = take
        self._raw.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Returns the shared buffer for the socket's next bytes."""
        return self._buffers.encrypted

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypts the first ``nbytes`` of the buffer and passes the plaintext to ``take``."""
        tls, encrypted = self._tls, self._buffers.encrypted[:nbytes]
        fed, size, more = 0, 0, True
        while more and fed < nbytes and self._reads():
            tls._incoming.write(encrypted[fed : fed + _FED_BYTES])
            fed = min(nbytes, fed + _FED_BYTES)
            size, more = self._decrypted(size)
        if size:
            more = self._take(self._buffers.plain[:size]) and more
        if not more or not self._reads():
            self._unread(encrypted[fed:])
        elif tls._outgoing.pending:  # TLS itself answers, for example a key update
            tls._process_outgoing()

    def _reads(self) -> bool:
        return self._tls._state is SSLProtocolState.WRAPPED and not self._tls._app_reading_paused

    def _decrypted(self, size: int) -> tuple[int, bool]:
        """Decrypts all complete records to the plaintext buffer, after its first ``size`` bytes.

        Returns the number of bytes in the buffer, and whether to continue: False once the body is
        complete, or TLS ends or fails.
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
        except _NEEDS_MORE:
            return size, True
        except ssl.SSLError:
            return size, False

    def _unread(self, encrypted: memoryview) -> None:
        """Reinstalls asyncio's TLS protocol and feeds it the remaining ``encrypted`` bytes.

        It meets there, too, any error that ended the reading here.
        """
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
        """Passes the end of the stream to asyncio's TLS protocol, and reinstalls it."""
        self._raw.set_protocol(self._tls)
        kept: bool | None = self._tls.eof_received()
        return kept

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes the loss of the connection to asyncio's TLS protocol."""
        self._tls.connection_lost(exc)

    def pause_writing(self) -> None:
        """Tells asyncio's TLS protocol that the send buffer is full."""
        self._tls.pause_writing()

    def resume_writing(self) -> None:
        """Tells asyncio's TLS protocol that the send buffer has drained."""
        self._tls.resume_writing()


def read_body(transport: asyncio.Transport, buffers: Buffers, take: Take) -> None:
    """Routes a connection's plaintext to ``take`` until that returns False.

    Does nothing if the transport does not use asyncio's TLS; data then takes the normal path.
    """
    tls = getattr(transport, "_ssl_protocol", None)
    if isinstance(tls, SSLProtocol) and isinstance(
        getattr(tls, "_transport", None), asyncio.Transport
    ):
        BodyReader(tls, buffers, take)
