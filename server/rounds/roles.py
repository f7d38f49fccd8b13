"""Which nodes a round may have train, and which evaluate.

All do both, unless some clients hold back all of their data (``federation.holdout_by``): these
judges never train, and the others never evaluate. See `fedcore.training.roles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fedcore.config.run import FederationConfig
from fedcore.errors import ConfigError
from fedcore.observability.words import counted
from fedcore.training.roles import is_judge, judging_place

Divided = tuple[Sequence[int], Sequence[int]]
"""The nodes that train, and those that evaluate."""
MIN_JUDGES = 2
"""Fewest clients that judge: of a single one, no interval follows."""


@dataclass(frozen=True)
class Roles:
    """Divides nodes by what their clients do."""

    federation: FederationConfig
    name_of: Callable[[int], str]
    """Returns the name of a node's client, which decides what it does."""
    _known: dict[range, Divided] = field(default_factory=dict, repr=False, compare=False)
    """The divided nodes of a simulation, which are the same in every round."""

    def training(self, nodes: Iterable[int]) -> Sequence[int]:
        """Returns the nodes that train, in the same order."""
        return self._divided(nodes)[0]

    def evaluating(self, nodes: Iterable[int]) -> Sequence[int]:
        """Returns the nodes that evaluate, in the same order."""
        return self._divided(nodes)[1]

    def _divided(self, nodes: Iterable[int]) -> Divided:
        if not self.federation.has_judges:
            same = nodes if isinstance(nodes, Sequence) else list(nodes)
            return same, same
        if isinstance(nodes, range) and nodes in self._known:
            return self._known[nodes]
        training, judging = list[int](), list[int]()
        for node in nodes:
            alike = judging if is_judge(self.federation, self.name_of(node)) else training
            alike.append(node)
        if isinstance(nodes, range):
            self._known[nodes] = training, judging
        return training, judging


def roles_of(federation: FederationConfig, name_of: Callable[[int], str] | None) -> Roles:
    """Returns the roles of nodes.

    Args:
        federation: Settings of the run.
        name_of: Returns the name of a node's client; None where the server does not know it.

    Raises:
        ConfigError: clients' names decide who judges, and the server does not know them.
    """
    if name_of is None:
        if federation.has_judges:
            raise ConfigError(
                "federation.holdout_by = 'clients': who judges follows from clients' names, and "
                "in a Flower network that fedcore does not run the server knows nodes by number "
                "alone. Nothing was trained; set holdout_by to 'rows', or run the server with "
                "`fedcore server start`."
            )
        name_of = str
    return Roles(federation, name_of)


def check_roles(federation: FederationConfig, clients: Sequence[str]) -> None:
    """Rejects clients of whom too few judge, or too few train.

    Raises:
        ConfigError: fewer than `MIN_JUDGES` judge, or fewer than a cohort train.
    """
    if not federation.has_judges:
        return
    judges = sum(is_judge(federation, name) for name in clients)
    share, training = federation.holdout, len(clients) - judges
    drawn = (
        f"federation.holdout_by = 'clients' with holdout = {share:g}: {judges} of "
        f"{counted(len(clients), 'client')} hold back all of their data, as their names decide"
    )
    if judges < MIN_JUDGES:
        raise ConfigError(
            f"{drawn}, and at least {MIN_JUDGES} must judge. Nothing was run; "
            f"{_larger_share(clients)}set holdout_by to 'rows'."
        )
    few = f"the {training} others are fewer than federation.cohort = {federation.cohort}"
    if training < (federation.cohort or 1):
        raise ConfigError(
            f"{drawn}, and {few if training else 'none is left to train'}. Nothing was run; lower "
            "the cohort or the holdout."
        )


def _larger_share(clients: Sequence[str]) -> str:
    """Advises the smallest share, in hundredths, by which enough clients judge; "" without one."""
    if len(clients) <= MIN_JUDGES:
        return ""
    place = sorted(map(judging_place, clients))[MIN_JUDGES - 1]
    hundredths = int(place * 100) + 1
    return f"set holdout to {hundredths / 100:g}, or " if hundredths < 100 else ""
