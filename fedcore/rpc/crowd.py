"""Keeps room for new connections on a port whose server does not choose among them, as gRPC's.

The core refuses connections above a limit, whoever has the others: a caller that opens many, and
leaves them idle or their TLS handshake unfinished, would keep all others out. The core offers no
choice of its own. So the sockets on the port are looked at from time to time, and of those without
a call, the ones that wait longest from the network address with the most are shut down.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_DESCRIPTORS = "/dev/fd"
IDLE_SHARE = 4
"""Connections without a call may take one in so many of all that the core accepts, and no more than
half of what those with one leave."""
SWEEP_S = 0.5
"""Least seconds between two looks; longer where a look takes long."""
_REST = 20
"""A look may take one in so many of all seconds."""

Address = tuple[str, int]


class Crowd:
    """The connections on one port."""

    def __init__(
        self,
        port: int,
        *,
        most: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Looks at nothing yet.

        Args:
            port: The port on which this process listens.
            most: Most connections that are accepted on it.
            clock: Returns monotonic seconds.
        """
        self._port, self._most, self._clock = port, most, clock
        self._seen: dict[Address, float] = {}
        """When each connection was first seen."""
        self._next_s = 0.0

    def sweep(self, busy: Collection[Address], *, others: int = 0) -> int:
        """Shuts down connections without a call that are too many; returns how many.

        Where there are many, this takes some 10 ms for a thousand.

        Args:
            busy: The addresses from which calls are open.
            others: Open files that are no connections on this port, at least.
        """
        began_s = self._clock()
        if began_s < self._next_s:
            return 0
        closed = self._sweep(busy, others, began_s)
        took_s = self._clock() - began_s
        self._next_s = began_s + max(SWEEP_S, _REST * took_s)
        return closed

    def _sweep(self, busy: Collection[Address], others: int, now_s: float) -> int:
        with suppress(
            OSError
        ):  # where the system does not list descriptors, the core's limit holds
            names = [path.name for path in Path(_DESCRIPTORS).iterdir()]
            if len(names) - len(busy) - others <= self._room(len(busy)):
                self._seen.clear()
                return 0
            descriptors = [int(name) for name in names if name.isdecimal()]
            return self._made_room(descriptors, busy, now_s)
        return 0

    def _room(self, busy: int) -> int:
        """Returns how many connections without a call there may be, beside ``busy`` with one."""
        return min(self._most // IDLE_SHARE, max(self._most - busy, 2) // 2)

    def _made_room(self, descriptors: list[int], busy: Collection[Address], now_s: float) -> int:
        there = {}
        for descriptor in descriptors:
            address = _peer_on(descriptor, self._port)
            if address is not None:
                there[address] = descriptor
        self._seen = {address: self._seen.get(address, now_s) for address in there}
        idle = sorted((one for one in there if one not in busy), key=lambda one: self._seen[one])
        surplus = len(idle) - self._room(len(there) - len(idle))
        return sum(self._shut(there[one], one) for one in _largest_first(idle, surplus))

    def _shut(self, descriptor: int, address: Address) -> bool:
        with _socket_of(descriptor) as found:
            # The descriptor may be another file's by now.
            if found is None or _peer_of(found, self._port) != address:
                return False
            with suppress(OSError):  # it is closed already
                found.shutdown(socket.SHUT_RDWR)
            return True


@contextmanager
def _socket_of(descriptor: int) -> Iterator[socket.socket | None]:
    """Yields a copy of a descriptor's socket; None if it is none."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        yield None
        return
    try:
        found = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        yield None
        return
    with found:
        yield found


def _peer_on(descriptor: int, port: int) -> Address | None:
    """Returns the remote address of a descriptor that is a connection on ``port``."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
    except OSError:
        return None
    with _socket_of(descriptor) as found:
        return None if found is None else _peer_of(found, port)


def _peer_of(found: socket.socket, port: int) -> Address | None:
    """Returns the remote address of a connection whose local port is ``port``; None of others."""
    try:
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port:
            return plain_address(found.getpeername())
    except OSError:  # it listens, or has ended
        pass
    return None


def plain_address(name: tuple[Any, ...]) -> Address:
    """Returns an address as a socket names it in the form that `Crowd` compares."""
    return _plain(name[0]), name[1]


def _plain(host: str) -> str:
    """Returns an address in one form: IPv4 also where a socket of IPv6 has it."""
    found = ipaddress.ip_address(host.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def address_of(peer: str) -> Address:
    """Parses gRPC's form of an address, such as ``ipv6:%5B::1%5D:443``."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        return _plain(host.strip("[]")), int(port)
    except ValueError:
        return peer, 0


def _network(address: Address) -> Hashable:
    """Returns what is counted together: an IPv4 address, or a /64 network of IPv6."""
    found = ipaddress.ip_address(address[0])
    return found if isinstance(found, ipaddress.IPv4Address) else found.packed[:8]


def _largest_first(oldest_first: list[Address], count: int) -> list[Address]:
    """Returns ``count`` addresses, each the oldest of the network that then has the most."""
    groups = defaultdict[Hashable, list[Address]](list)
    for address in reversed(oldest_first):
        groups[_network(address)].append(address)
    by_size = defaultdict[int, list[Hashable]](list)
    for network, its in groups.items():
        by_size[len(its)].append(network)
    chosen: list[Address] = []
    size = max(by_size, default=0)
    while len(chosen) < count and size:
        if not by_size[size]:
            size -= 1
            continue
        network = by_size[size].pop(0)
        chosen.append(groups[network].pop())
        by_size[size - 1].append(network)
    return chosen


def raise_file_limit(most: int) -> int:
    """Raises this process's limit on open files as far as allowed, up to ``most``; returns it.

    The soft limit is usually 1024; a process may raise it up to the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = most if hard == unlimited else min(hard, most)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return wanted if soft == unlimited else soft
