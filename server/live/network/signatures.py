"""What comes from devices is used once its signature holds, and weighs what was enrolled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import Message, MessageType

from fedcore.crypto.envelope import Replays
from fedcore.crypto.roster import Member, Roster
from fedcore.errors import CertificateRefused, InvalidUpdate, TrustError, UpdateForeign
from fedcore.flower.fleet_grid import Check
from fedcore.observability.foreign import foreign
from fedcore.updates.messages import ARRAYS
from fedcore.updates.replies import check_legible
from fedcore.updates.seal import base_digest, round_of, verify_reply
from server.live.network.limits import Refusals
from server.live.network.members import weigh, weights_of


@dataclass(frozen=True)
class _Expected:
    """What the reply to one message must be signed for."""

    purpose: str
    round: int
    node_id: int
    base_sha256: str
    weight: int


class SignatureChecks:
    """Makes the check of each reply from the message that it answers."""

    def __init__(
        self,
        roster: Roster,
        key_of: Callable[[int], bytes | None],
        *,
        run_id: str,
        refusals: Refusals,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begins before the first round.

        Args:
            roster: Who is a member, and what its updates weigh.
            key_of: The key of a node; None when there is no such node.
            run_id: As `fedcore.updates.seal.run_digest` gives it.
            refusals: Where what is refused is told.
            clock: Seconds since 1970 (UTC).
        """
        self._roster = roster
        self._key_of = key_of
        self._run_id = run_id
        self._refusals = refusals
        self._clock = clock
        self._moment: tuple[str, int] = ("", 0)
        self._replays = Replays()

    def expect(self, messages: Sequence[Message]) -> list[Check]:
        """A check for the reply to each message, in order.

        What a client weighs is what `weights_of` says now, and what a reply says of it is not
        used; a round that is kept in a journal weighs as was noted there when it selected.
        """
        weights = weights_of(self._roster, [message.metadata.dst_node_id for message in messages])
        bases: dict[int, str] = {}  # messages of a round share their weights
        checks = []
        for message, weight in zip(messages, weights, strict=True):
            content = message.content
            shared = id(content.get(ARRAYS, content))
            if shared not in bases:
                bases[shared] = base_digest(content)
            expected = _Expected(
                purpose=message.metadata.message_type,
                round=round_of(content),
                node_id=message.metadata.dst_node_id,
                base_sha256=bases[shared],
                weight=weight,
            )
            checks.append(self._check(expected, self._replays_of(expected)))
        return checks

    def _replays_of(self, expected: _Expected) -> Replays:
        """One record for each round and purpose; a question outside rounds has its own."""
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
        # First of all: a signature covers names and numbers, which must be such to be hashed.
        check_legible(reply.content, where=where)
        if member is None:
            raise CertificateRefused(
                f"round {expected.round}: node {expected.node_id} is no longer a member of this "
                "project. Its update was not aggregated; enrol it again, if it should take part."
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
                f"{where}: it is a reply to another type of message than {expected.purpose!r}. It "
                "was not aggregated; a node answers what it was asked."
            )
        replays.accept(envelope)
        if expected.purpose in (MessageType.TRAIN, MessageType.EVALUATE):
            weigh(reply, expected.weight)


@dataclass(frozen=True)
class DevicePeers:
    """Devices by the names that they were enrolled under; what is refused goes to the log."""

    roster: Roster
    key_of: Callable[[int], bytes | None]
    refusals: Refusals

    def name(self, node_id: int) -> str:
        """``client 'edge-0'``, or the node's number where it is no member any more."""
        member = self._member(node_id)
        return f"client {foreign(member.name, 100)!r}" if member else f"node {node_id}"

    def client(self, node_id: int) -> str:
        """``edge-0``, or the node's number where it is no member any more."""
        member = self._member(node_id)
        return member.name if member else f"node {node_id}"

    def _member(self, node_id: int) -> Member | None:
        public = self.key_of(node_id)
        return self.roster.member(public) if public is not None else None

    def said(self, node_id: int, reason: str) -> str:
        """The reason behind the device's name: it may have said anything, of any other device."""
        name = self.name(node_id)
        return reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"

    def refused(self, node_id: int, reason: str) -> None:
        """Logs it: one line for each device in a while."""
        self.refusals.note(self.name(node_id), 409, reason)
