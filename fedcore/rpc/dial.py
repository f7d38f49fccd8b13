"""Opens TCP connections to a host name, with one timeout over all of its addresses."""

from __future__ import annotations

import socket
import time

_MAX_ADDRESSES = 8
"""Most addresses tried per name: a hostile DNS server can list thousands."""


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """Returns a connection to the first address of ``host`` that accepts one.

    `socket.create_connection` gives each address the whole timeout. Here each address gets an equal
    share of the remaining time, so that an unresponsive one does not block the others.

    Args:
        host: A name or an address.
        port: The TCP port.
        timeout_s: Seconds for all attempts together, after the name lookup.

    Raises:
        OSError: no address accepts a connection.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:_MAX_ADDRESSES]
    until_s, failed = time.monotonic() + timeout_s, OSError(f"{host}: no address")
    for place, (family, kind, protocol, _, address) in enumerate(found):
        share_s = (until_s - time.monotonic()) / (len(found) - place)
        if share_s <= 0:
            raise TimeoutError(f"{host}: none of its addresses answered in time")
        try:
            connection = socket.socket(family, kind, protocol)
        except OSError as error:  # the system has no such family, IPv6 say
            failed = error
            continue
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
