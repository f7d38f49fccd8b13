"""Connections of the network port, each known from its acceptance to its end.

TLS, HTTP and the Fleet API each have limits of their own, and none of them sees a peer that says
nothing. What is counted here is what the system grants: open sockets.
"""

from __future__ import annotations

import ipaddress
import resource
import socket
import time
from collections.abc import Callable, Collection, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from server.live.network.limits import Limits, Refusals

_MOST_DESCRIPTORS = 65_536
_KEPT_BACK = 256
"""Descriptors for all that is no connection: journal, log, sockets of operators."""
_EACH = 3
"""Descriptors that a device takes: its connection, its stream, and a file while a body comes in."""
_FRESH_S = 3.0
"""A connection this young is let ask once: only an answer tells its owner that it is no member."""
_LATE, _TOO_MANY = 408, 429


class Peer(Protocol):
    """The protocol of a connection whose owner TLS has proved."""

    public: bytes
    seen: float
    """When something came last."""
    due: float | None
    """When what the peer has begun to send must have come."""
    stuck: float | None
    """Since when it takes nothing of what was sent to it."""

    def busy(self) -> bool:
        """Whether a call is going on."""

    def drop(self) -> None:
        """Ends the connection at once."""


@dataclass
class _Open:
    """A connection that is open. Without a peer it is still shaking hands."""

    socket: socket.socket
    address: str
    network: Hashable
    since: float
    peer: Peer | None = None
    dropped: bool = False
    """Told to end; its descriptor is free a turn of the event loop later."""

    def drop(self) -> None:
        self.dropped = True
        if self.peer is not None:
            self.peer.drop()
        else:
            with suppress(OSError):  # it has hung up itself
                self.socket.shutdown(socket.SHUT_RDWR)  # its transport closes it then


def grant_descriptors() -> int:
    """Has the system grant as many open files as it does, and says how many connections that is.

    Shells grant 1024 unless they are asked for more; the owner of a process may ask.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_DESCRIPTORS if hard == unlimited else min(hard, _MOST_DESCRIPTORS)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    granted = wanted if soft == unlimited else soft
    return max(granted - min(_KEPT_BACK, granted // 4), _EACH) // _EACH


class Connections:
    """Who is connected, and who must go when it is too many or takes too long.

    Belongs to the event loop that it is used in. Nobody is turned away at the door: where there is
    no room, whoever has the most connections loses its oldest. So a stranger with one address
    crowds out itself, and a member with one key does.
    """

    def __init__(
        self,
        limits: Limits,
        refusals: Refusals,
        *,
        most: int,
        name_of: Callable[[bytes], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with none; ``most`` may be open at a time.

        ``name_of`` is whose a key is, None where it is no member's.
        """
        self._limits = limits
        self._refusals = refusals
        self._most = most
        self._most_half = max(min(limits.half_open, most // 2), 1)
        self._name_of = name_of
        self._clock = clock
        self._half: dict[int, _Open] = {}
        """Those that are shaking hands, by descriptor, the oldest first."""
        self._whole: dict[int, _Open] = {}
        self._owned: dict[bytes, dict[int, _Open]] = {}
        """The whole ones by key, too."""

    def __len__(self) -> int:
        """How many are open, those that are shaking hands included."""
        return len(self._half) + len(self._whole)

    def listener(self, plain: socket.socket) -> socket.socket:
        """``plain``, which is used up, as a socket that lets in by these rules."""
        return _Listener(self, plain)

    def has_room(self) -> bool:
        """Whether one more may be accepted now; where not, one ends, and there soon is."""
        if len(self._half) >= self._most_half:
            self._crowd_out(self._half.values())
        elif len(self) >= self._most:
            self._crowd_out(self._whole.values())
        else:
            return True
        return False

    def accepted(self, connection: socket.socket, address: str) -> None:
        """A connection has been accepted."""
        one = _Open(connection, address, _network(address), self._clock())
        self._half[connection.fileno()] = one

    def proved(self, descriptor: int, peer: Peer) -> None:
        """The owner of a connection has shown its certificate."""
        one = self._half.pop(descriptor)
        one.peer, one.since = peer, self._clock()
        peer.seen, peer.due = one.since, one.since + self._limits.headers_s
        self._whole[descriptor] = one
        self._owned.setdefault(peer.public, {})[descriptor] = one
        own = [each for each in self._owned[peer.public].values() if not each.dropped]
        if len(own) > self._limits.connections_each:
            most = self._limits.connections_each
            self._tell(one, _TOO_MANY, f"more than {most} connections; the idlest was cut")
            _idlest(own).drop()

    def closed(self, descriptor: int) -> None:
        """A connection is over, and its descriptor free."""
        self._half.pop(descriptor, None)
        one = self._whole.pop(descriptor, None)
        if one is not None and one.peer is not None:
            own = self._owned[one.peer.public]
            del own[descriptor]
            if not own:
                del self._owned[one.peer.public]

    def waits_for_headers(self, peer: Peer) -> None:
        """A peer has begun a request, or has yet to finish what nobody waits for."""
        peer.due = self._clock() + self._limits.headers_s

    def now(self) -> float:
        """The time by this clock, in seconds."""
        return self._clock()

    def refused(self, descriptor: int, status: int, text: str) -> None:
        """Tells of what was refused before it was a call."""
        self._tell(self._whole[descriptor], status, text)

    def sweep(self, members: Collection[bytes]) -> None:
        """Ends what took too long, and what belongs to no key among ``members``."""
        now, limits = self._clock(), self._limits
        for one in (*self._half.values(), *self._whole.values()):
            peer = one.peer
            if one.dropped:
                continue
            if peer is None:
                if now - one.since > limits.handshake_s:
                    self._tell(one, _LATE, f"no handshake within {limits.handshake_s:g} s")
                    one.drop()
            elif peer.public not in members:
                if now - one.since > _FRESH_S:
                    self._tell(one, 403, "cut, as it is no longer a member's")
                    one.drop()
            elif peer.due is not None and now > peer.due:
                self._tell(one, _LATE, f"no whole request within {limits.headers_s:g} s")
                one.drop()
            elif peer.stuck is not None and now - peer.stuck > limits.body_s:
                self._tell(one, _LATE, f"nothing of an answer taken within {limits.body_s:g} s")
                one.drop()

    def _crowd_out(self, among: Iterable[_Open]) -> None:
        groups: dict[Hashable, list[_Open]] = {}
        for one in among:
            if one.dropped:
                return  # its room is free in a moment
            groups.setdefault(one.peer.public if one.peer else one.network, []).append(one)
        if groups:
            one = _idlest(max(groups.values(), key=len))
            self._tell(one, _TOO_MANY, "gave way to another, as there were too many")
            one.drop()

    def _tell(self, one: _Open, status: int, text: str) -> None:
        name = self._name_of(one.peer.public) if one.peer is not None else None
        self._refusals.note(name or one.address, status, f"connection: {text}")


class _Listener(socket.socket):
    """A socket that listens, and whose connections are known until they are closed."""

    def __init__(self, connections: Connections, plain: socket.socket) -> None:
        """Takes the place of ``plain``."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """One more connection.

        Raises:
            BlockingIOError: there is none, or no room; whoever waits stays in the system's queue.
        """
        if not self._connections.has_room():
            raise BlockingIOError
        plain, address = super().accept()
        accepted = _Accepted(self._connections, plain)
        self._connections.accepted(accepted, str(address[0]))
        return accepted, address


class _Accepted(socket.socket):
    """A connection that says when it is closed."""

    def __init__(self, connections: Connections, plain: socket.socket) -> None:
        """Takes the place of ``plain``."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self._connections = connections

    def close(self) -> None:
        """Closes it."""
        self._connections.closed(self.fileno())
        super().close()


def _idlest(among: list[_Open]) -> _Open:
    """Of some, one that has no call going on, and was heard from longest ago."""
    return min(
        among, key=lambda one: (one.peer.busy(), one.peer.seen) if one.peer else (False, one.since)
    )


def _network(address: str) -> Hashable:
    """Whom an address belongs to: one of IPv6 comes with 2**64 others."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return found
    return found.ipv4_mapped or found.packed[:8]
