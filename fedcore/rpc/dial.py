"""Connections to a name, within a time that counts for all of its addresses together."""

from __future__ import annotations

import socket
import time

_MOST_ADDRESSES = 8
"""Of a name: whoever answers for it, as a network may, can list thousands."""


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to ``host``, at the first of its addresses that takes one.

    `socket.create_connection` gives each address all of the time. Here each has its share of what
    is left, so that one that swallows what comes does not keep the others from being tried.

    Args:
        host: A name or an address.
        port: There.
        timeout_s: How long all of it may take, once the name has been looked up.

    Raises:
        OSError: nobody is there.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:_MOST_ADDRESSES]
    until_s, failed = time.monotonic() + timeout_s, OSError(f"{host}: no address")
    for place, (family, kind, protocol, _, address) in enumerate(found):
        share_s = (until_s - time.monotonic()) / (len(found) - place)
        if share_s <= 0:
            raise TimeoutError(f"{host}: none of its addresses answered in time")
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(share_s)
            connection.connect(address)
        except OSError as error:
            connection.close()
            failed = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failed
