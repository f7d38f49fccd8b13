"""What rounds ask of the list of members: whom they may reach, how many, and what each weighs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flwr.app import Message, MetricRecord

from fedcore.crypto.roster import Member, Roster
from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.updates.messages import METRICS, NUM_EXAMPLES


def devices_of(roster: Roster) -> dict[int, Member]:
    """The devices that are members now, by node."""
    members = (member for member in roster.members() if member.role == "device")
    return {node_id_of(member.public): member for member in members}


def weights_of(roster: Roster, nodes: Sequence[int]) -> list[int]:
    """What an update of each node weighs, in examples, as the list of members is now.

    That is what it committed to at enrolment, if every device of the project did; else all weigh
    the same, and so does a node that is no member. Those asked do not decide: a device that comes
    or goes between rounds must not change the rule for the others.
    """
    devices = devices_of(roster)
    if any(member.num_examples is None for member in devices.values()):
        return [1] * len(nodes)
    return [devices[node].num_examples or 1 if node in devices else 1 for node in nodes]


def weigh(reply: Message, weight: int) -> None:
    """Has a reply weigh so many examples, whatever it says of itself."""
    metrics = reply.content.get(METRICS)
    if isinstance(metrics, MetricRecord):
        metrics[NUM_EXAMPLES] = weight


@dataclass(frozen=True)
class Members:
    """The devices of a project, as the rounds of a run see them."""

    roster: Roster
    fleet: Fleet

    def admit(self, nodes: Collection[int]) -> Collection[int]:
        """Enlists those of ``nodes`` who are members, and returns them."""
        devices = devices_of(self.roster)
        return {self.fleet.enlist(devices[node].public) for node in nodes if node in devices}

    def weights(self, nodes: Sequence[int]) -> list[int]:
        """As `weights_of`."""
        return weights_of(self.roster, nodes)

    def count(self, *, drained: Collection[str]) -> int:
        """How many devices take part, the drained ones left out."""
        devices = devices_of(self.roster).values()
        return sum(member.name not in drained for member in devices)
