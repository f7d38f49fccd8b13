"""The member list as rounds use it: eligible devices, their number, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fedcore.crypto.roster import Member, Roster
from fedcore.flower.fleet import Fleet, node_id_of


def devices_of(roster: Roster) -> dict[int, Member]:
    """Returns the devices that are members now, by node id."""
    members = (member for member in roster.members() if member.role == "device")
    return {node_id_of(member.public): member for member in members}


def weights_of(roster: Roster, nodes: Sequence[int]) -> list[int]:
    """Returns the aggregation weight of each node, in examples, by the current member list.

    If every device of the project committed to a number of examples at enrolment, a node weighs
    its number, or 1 if it is no member; else every node weighs 1. The rule depends on all devices,
    not only on ``nodes``, so that it does not change with the cohort.
    """
    devices = devices_of(roster)
    if any(member.num_examples is None for member in devices.values()):
        return [1] * len(nodes)
    return [devices[node].num_examples or 1 if node in devices else 1 for node in nodes]


def count_devices(
    roster: Roster,
    *,
    drained: Collection[str],
    among: Callable[[str], bool] = lambda name: True,
) -> int:
    """Returns the number of devices that are members, not drained, and ``among`` by their names."""
    devices = devices_of(roster).values()
    return sum(member.name not in drained and among(member.name) for member in devices)


@dataclass(frozen=True)
class Members:
    """The devices of a project that rounds may select."""

    roster: Roster
    fleet: Fleet

    def admit(self, nodes: Collection[int]) -> Collection[int]:
        """Registers the members among ``nodes`` with the fleet, and returns them."""
        devices = devices_of(self.roster)
        return {self.fleet.register_node(devices[node].public) for node in nodes if node in devices}

    def missing(self, connected: Collection[int], *, drained: Collection[str]) -> list[str]:
        """Returns the names of devices that are members, not drained and not connected, sorted."""
        devices, here = devices_of(self.roster), set(connected)
        return sorted(
            member.name
            for node, member in devices.items()
            if node not in here and member.name not in drained
        )

    def count(
        self, *, drained: Collection[str], among: Callable[[str], bool] = lambda name: True
    ) -> int:
        """Returns the number of devices, see `count_devices`."""
        return count_devices(self.roster, drained=drained, among=among)
