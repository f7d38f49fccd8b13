"""Verification of devices' replies: signature and replay; and the devices' names and weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedcore.crypto.envelope import Replays
from fedcore.crypto.roster import Member, Roster
from fedcore.errors import CertificateRefused, InvalidUpdate, TrustError, UpdateForeign
from fedcore.flower.fleet_grid import Check
from fedcore.observability.foreign import foreign
from fedcore.updates.messages import ARRAYS
from fedcore.updates.replies import check_structure
from fedcore.updates.seal import base_digest, round_of, verify_reply
from server.live.network.limits import Refusals
from server.live.network.members import weights_of


@dataclass(frozen=True)
class _Expected:
    """The context that the signature of the reply to one message must cover."""

    purpose: str
    round: int
    node_id: int
    base_sha256: str


class SignatureChecks:
    """Creates the check of each reply from the message that it answers; used by the grid."""

    def __init__(
        self,
        roster: Roster,
        key_of: Callable[[int], bytes | None],
        *,
        run_id: str,
        refusals: Refusals,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Starts without a current round.

        Args:
            roster: The members.
            key_of: Returns the public key of a node; None if there is no such node.
            run_id: Digest of the run's settings, from `fedcore.updates.seal.run_digest`.
            refusals: Log of rejected replies.
            clock: Returns seconds since 1970 (UTC).
        """
        self._roster = roster
        self._key_of = key_of
        self._run_id = run_id
        self._refusals = refusals
        self._clock = clock
        self._moment: tuple[str, int] = ("", 0)
        self._replays = Replays()

    def expect(self, messages: Sequence[Message]) -> list[Check]:
        """Returns a check for the reply to each message, in order.

        A check raises if the reply must be rejected.
        """
        bases: dict[int, str] = {}  # messages of a round share their weights
        checks = []
        for message in messages:
            content = message.content
            shared = id(content.get(ARRAYS, content))
            if shared not in bases:
                bases[shared] = base_digest(content)
            expected = _Expected(
                purpose=message.metadata.message_type,
                round=round_of(content),
                node_id=message.metadata.dst_node_id,
                base_sha256=bases[shared],
            )
            checks.append(self._check(expected, self._replays_of(expected)))
        return checks

    def _replays_of(self, expected: _Expected) -> Replays:
        """Returns the replay record: one per round and purpose, a new one outside rounds."""
        moment = (expected.purpose, expected.round)
        if moment != self._moment or not expected.round:
            self._moment, self._replays = moment, Replays()
        return self._replays

    def _member(self, node_id: int) -> Member | None:
        public = self._key_of(node_id)
        return self._roster.member(public) if public is not None else None

    def _check(self, expected: _Expected, replays: Replays) -> Check:
        def check(reply: Message) -> None:
            member = self._member(expected.node_id)
            try:
                self._open(expected, replays, member, reply)
            except (TrustError, InvalidUpdate) as error:
                name = member.name if member else f"node {expected.node_id}"
                self._refusals.note(name, 403, str(error))
                raise

        return check

    def _open(
        self, expected: _Expected, replays: Replays, member: Member | None, reply: Message
    ) -> None:
        where = f"round {expected.round}: reply from {member.name if member else 'a stranger'!r}"
        # Must be first: the signature covers names and numbers, which must be valid to be hashed.
        check_structure(reply.content, where=where)
        if member is None:
            raise CertificateRefused(
                f"round {expected.round}: node {expected.node_id} is no longer a member of this "
                "project. Its update was not aggregated; enrol it again if it should take part."
            )
        envelope = verify_reply(
            reply.content,
            purpose=expected.purpose,
            run_id=self._run_id,
            round=expected.round,
            node_id=expected.node_id,
            base_sha256=expected.base_sha256,
            public_key=member.public,
            now_s=self._clock(),
        )
        if reply.metadata.message_type != expected.purpose:
            raise UpdateForeign(
                f"{where}: it replies to another type of message, expected one to "
                f"{expected.purpose!r}. It was not aggregated; a node must reply to the request "
                "that it received."
            )
        replays.accept(envelope)


@dataclass(frozen=True)
class DevicePeers:
    """A `Peers` over devices: names and weights from enrolment, and the log of rejected replies."""

    roster: Roster
    key_of: Callable[[int], bytes | None]
    refusals: Refusals

    def name(self, node_id: int) -> str:
        """Returns ``client 'edge-0'``, or ``node 17`` if it is no longer a member; fit to print."""
        member = self._member(node_id)
        return f"client {foreign(member.name, 100)!r}" if member else f"node {node_id}"

    def client(self, node_id: int) -> str:
        """Returns ``edge-0``, or ``node 17`` if it is no longer a member; unescaped."""
        member = self._member(node_id)
        return member.name if member else f"node {node_id}"

    def weights(self, nodes: Sequence[int]) -> dict[int, int]:
        """Returns the weights of the nodes' replies, whatever they report, see `weights_of`."""
        return dict(zip(nodes, weights_of(self.roster, nodes), strict=True))

    def _member(self, node_id: int) -> Member | None:
        public = self.key_of(node_id)
        return self.roster.member(public) if public is not None else None

    def failure_text(self, node_id: int, reason: str) -> str:
        """Prefixes a device's reason with its name, as the reason may claim to be another's."""
        name = self.name(node_id)
        return reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"

    def rejected(self, node_id: int, reason: str) -> None:
        """Logs that a device's reply was rejected, throttled per device."""
        self.refusals.note(self.name(node_id), 409, reason)
