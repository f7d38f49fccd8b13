"""Limits on the connections of the network port, from accept to close.

TLS, HTTP and the Fleet API each have limits of their own, but none sees a peer that connects and
sends nothing. `Connections` therefore counts the resource that the system limits: open sockets.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Collection, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from fedcore.rpc.crowd import raise_file_limit
from server.live.network.limits import Limits, Refusals

_MAX_DESCRIPTORS = 65_536
_RESERVED_DESCRIPTORS = 256
"""Descriptors reserved for other uses: journal, log, sockets of operators."""
_PER_DEVICE = 3
"""Descriptors per device: its connection, its wake-up stream, and a file while a body arrives."""
_FRESH_S = 3.0
"""Age in seconds up to which a non-member's connection stays open: its owner learns only from the
answer to a request that it is not a member."""
_LATE, _TOO_MANY = 408, 429


class Peer(Protocol):
    """Protocol object of a connection after the TLS handshake. Times are by `Connections.now`."""

    public: bytes
    """Public key in the peer's certificate; empty if there is none."""
    seen: float
    """Time of the last data from the peer."""
    due: float | None
    """Deadline for the headers or the rest of a request; None if none is due."""
    stuck: float | None
    """Time since which the peer has read nothing of an answer; None if it reads."""

    def busy(self) -> bool:
        """Returns whether a request is being answered."""

    def drop(self) -> None:
        """Closes the connection at once."""


@dataclass
class _Open:
    """An open connection; ``peer`` is None during the TLS handshake."""

    socket: socket.socket
    address: str
    network: Hashable
    since: float
    peer: Peer | None = None
    dropped: bool = False
    """Whether it is being closed; the event loop frees the descriptor in its next iteration."""

    def drop(self) -> None:
        self.dropped = True
        if self.peer is not None:
            self.peer.drop()
        else:
            with suppress(OSError):  # the peer has disconnected already
                self.socket.shutdown(socket.SHUT_RDWR)  # makes its transport close it


def grant_descriptors() -> int:
    """Raises the limit on open files as far as allowed; returns the connections it permits."""
    granted = raise_file_limit(_MAX_DESCRIPTORS)
    return max(granted - min(_RESERVED_DESCRIPTORS, granted // 4), _PER_DEVICE) // _PER_DEVICE


class Connections:
    """Tracks open connections, and closes some when there are too many or they are too slow.

    Use it from one event loop only. It never rejects a new connection outright: without room, the
    network address (during the handshake) or the key (after it) with the most connections loses
    its most idle one. An attacker with one address or one key therefore displaces only itself.
    """

    def __init__(
        self,
        limits: Limits,
        refusals: Refusals,
        *,
        max_connections: int,
        name_of: Callable[[bytes], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without connections.

        Args:
            limits: Limits per identity, and timeouts.
            refusals: Log of closed connections.
            max_connections: Maximum number of open connections.
            name_of: Returns the name of the member with a key, or None.
            clock: Returns monotonic seconds.
        """
        self._limits = limits
        self._refusals = refusals
        self._max = max_connections
        self._max_half = max(min(limits.half_open, max_connections // 2), 1)
        self._name_of = name_of
        self._clock = clock
        self._half: dict[int, _Open] = {}
        """Connections in the TLS handshake, by descriptor, the oldest first."""
        self._whole: dict[int, _Open] = {}
        """Connections after the handshake, by descriptor."""
        self._owned: dict[bytes, dict[int, _Open]] = {}
        """The connections in ``_whole``, by key and descriptor."""

    def __len__(self) -> int:
        """Returns the number of open connections, including those in the handshake."""
        return len(self._half) + len(self._whole)

    def listener(self, plain: socket.socket) -> socket.socket:
        """Returns a listening socket that applies these limits; it takes over ``plain``."""
        return _Listener(self, plain)

    def has_room(self) -> bool:
        """Returns whether a connection may be accepted now; if not, closes one to make room."""
        if len(self._half) >= self._max_half:
            self._evict(self._half.values())
        elif len(self) >= self._max:
            self._evict(self._whole.values())
        else:
            return True
        return False

    def accepted(self, connection: socket.socket, address: str) -> None:
        """Registers a connection that has just been accepted."""
        one = _Open(connection, address, _network(address), self._clock())
        self._half[connection.fileno()] = one

    def handshake_done(self, descriptor: int, peer: Peer) -> None:
        """Registers the end of a connection's handshake; enforces the limit per identity."""
        one = self._half.pop(descriptor)
        one.peer, one.since = peer, self._clock()
        peer.seen, peer.due = one.since, one.since + self._limits.headers_s
        self._whole[descriptor] = one
        self._owned.setdefault(peer.public, {})[descriptor] = one
        own = [each for each in self._owned[peer.public].values() if not each.dropped]
        if len(own) > self._limits.connections_each:
            limit = self._limits.connections_each
            self._log(
                one,
                _TOO_MANY,
                f"more than {limit} connections; the longest idle one was closed",
            )
            _idlest(own).drop()

    def closed(self, descriptor: int) -> None:
        """Unregisters a connection, just before its descriptor is closed."""
        self._half.pop(descriptor, None)
        one = self._whole.pop(descriptor, None)
        if one is not None and one.peer is not None:
            own = self._owned[one.peer.public]
            del own[descriptor]
            if not own:
                del self._owned[one.peer.public]

    def waits_for_headers(self, peer: Peer) -> None:
        """Starts the deadline for a request's headers, or for the rest of an answered request."""
        peer.due = self._clock() + self._limits.headers_s

    def now(self) -> float:
        """Returns the current time of the clock, in seconds."""
        return self._clock()

    def refused(self, descriptor: int, status: int, text: str) -> None:
        """Logs a rejection on a connection before there was a valid request."""
        self._log(self._whole[descriptor], status, text)

    def sweep(self, members: Collection[bytes]) -> None:
        """Closes connections that exceed a timeout, or whose key is not among ``members``."""
        now, limits = self._clock(), self._limits
        for one in (*self._half.values(), *self._whole.values()):
            peer = one.peer
            if one.dropped:
                continue
            if peer is None:
                if now - one.since > limits.handshake_s:
                    self._log(one, _LATE, f"no handshake within {limits.handshake_s:g} s")
                    one.drop()
            elif peer.public not in members:
                if now - one.since > _FRESH_S:
                    self._log(one, 403, "closed: its peer is no longer a member")
                    one.drop()
            elif peer.due is not None and now > peer.due:
                self._log(one, _LATE, f"no complete request within {limits.headers_s:g} s")
                one.drop()
            elif peer.stuck is not None and now - peer.stuck > limits.body_s:
                self._log(
                    one, _LATE, f"the peer read nothing of the response within {limits.body_s:g} s"
                )
                one.drop()

    def _evict(self, among: Iterable[_Open]) -> None:
        groups: dict[Hashable, list[_Open]] = {}
        for one in among:
            if one.dropped:
                return  # a connection is already being closed, so there soon is room
            groups.setdefault(one.peer.public if one.peer else one.network, []).append(one)
        if groups:
            one = _idlest(max(groups.values(), key=len))
            self._log(one, _TOO_MANY, "closed in favour of a newer one: too many connections")
            one.drop()

    def _log(self, one: _Open, status: int, text: str) -> None:
        name = self._name_of(one.peer.public) if one.peer is not None else None
        peer, text = name or one.address, f"connection: {text}"
        self._refusals.note(peer, status, text, member=name is not None)


class _Listener(socket.socket):
    """A listening socket whose connections are registered with `Connections`."""

    def __init__(self, connections: Connections, plain: socket.socket) -> None:
        """Takes over the descriptor of ``plain``."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Accepts a connection and registers it.

        Raises:
            BlockingIOError: no connection is pending, or there is no room for one; pending
                connections stay in the system's queue.
        """
        if not self._connections.has_room():
            raise BlockingIOError
        plain, address = super().accept()
        accepted = _Accepted(self._connections, plain)
        self._connections.accepted(accepted, str(address[0]))
        return accepted, address


class _Accepted(socket.socket):
    """A connection's socket, which unregisters itself when it is closed."""

    def __init__(self, connections: Connections, plain: socket.socket) -> None:
        """Takes over the descriptor of ``plain``."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self._connections = connections

    def close(self) -> None:
        """Unregisters and closes the socket."""
        self._connections.closed(self.fileno())
        super().close()


def _idlest(among: list[_Open]) -> _Open:
    """Returns the most idle connection: silent for the longest time, preferably without a call."""
    return min(
        among, key=lambda one: (one.peer.busy(), one.peer.seen) if one.peer else (False, one.since)
    )


def _network(address: str) -> Hashable:
    """Returns the key by which addresses are grouped: IPv4 addresses, and /64 networks of IPv6."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return found
    return found.ipv4_mapped or found.packed[:8]
