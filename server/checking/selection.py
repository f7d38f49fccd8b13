"""Which clients a check looks at in full, and trains."""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.errors import ConfigError
from fedcore.observability.words import counted
from fedcore.seeds import numpy_rng

Asked = str | int | Sequence[str] | None
"""``"all"``, a number of clients, names, or None for `SAMPLED` clients."""
SAMPLED = 6
"""Number of clients when none are asked for: the first, and five by chance."""


def asked_of(text: str) -> Asked:
    """Returns what ``--clients`` asks for: ``all``, a number, or names separated by commas.

    A name that is a number ends with a comma, as in ``3,``.
    """
    if text == "all":
        return text
    if text.isdecimal() and len(text) < 10:
        return int(text)
    return [name for name in text.split(",") if name]


def chosen_places(names: Sequence[str], asked: Asked, *, seed: int) -> list[int]:
    """Returns the places of the clients to check in full, the first one first.

    Raises:
        ConfigError: a client is unknown, or none is asked for.
    """
    count = len(names)
    if isinstance(asked, str):
        if asked != "all":
            asked = [asked]
        else:
            return list(range(count))
    if asked is None or isinstance(asked, int):
        wanted = SAMPLED if asked is None else asked
        if wanted < 1:
            raise ConfigError(f"clients = {asked}: expected at least 1 client to check.")
        drawn = numpy_rng(seed, "check").choice(
            count - 1, size=min(wanted, count) - 1, replace=False
        )
        return [0, *(1 + int(place) for place in sorted(drawn))]
    by_name = {name: place for place, name in enumerate(names)}
    unknown = [name for name in asked if name not in by_name]
    if unknown or not asked:
        raise ConfigError(
            f"client {unknown[0]!r}: not among the {counted(count, 'client')}."
            if unknown
            else "clients: expected at least one name."
        )
    return list(dict.fromkeys(by_name[name] for name in asked))
