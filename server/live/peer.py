"""Who is at the other end of a connection: uvicorn's protocol, with the peer's certificate."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedcore.crypto.certificates import peer_public
from fedcore.errors import TrustError

PUBLIC_KEY = "fedcore.public_key"
"""Where a request's scope holds the key that its connection was opened with."""
_MAX_HEADER_BYTES = 2**15
_WAITING_BYTES = 2**16
"""What may wait in a connection for its other end, each way, before more is asked for."""


class PeerProtocol(HttpToolsProtocol):
    """HTTP/1.1 for one connection, which knows whose it is and how long headers may be.

    uvicorn hands no certificate to the application, and its parser keeps any length of headers.
    """

    _header_bytes = 0
    _in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Reads the key out of the peer's certificate, once a connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_WAITING_BYTES)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            # OpenSSL keeps what its buffers have once grown to, by default 1 MiB a connection.
            transport.set_read_buffer_limits(_WAITING_BYTES)  # type: ignore[attr-defined]
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        try:
            public: bytes | None = peer_public(certificate) if certificate is not None else None
        except TrustError:
            public = None
        self.app_state = {**self.app_state, PUBLIC_KEY: public}

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, unless headers have grown past any that a client sends."""
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > _MAX_HEADER_BYTES:
            self.transport.abort()

    def shutdown(self) -> None:
        """Ends the connection, at once where no call is going on.

        A peer that lies idle would leave the server waiting for its half of the goodbye.
        """
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            super().shutdown()

    def on_headers_complete(self) -> None:
        """Begins the request."""
        self._in_headers, self._header_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Headers follow next."""
        self._in_headers = True
        super().on_message_complete()


def key_of(state: dict[str, Any]) -> bytes | None:
    """The key that the connection of a request was opened with."""
    public: bytes | None = state.get(PUBLIC_KEY)
    return public
