"""Virtual clock of a simulation: which clients of a round reply, when, and which are lost.

Nothing here computes or waits. A round gets the `fate` of each selected client, `resolve_round`
determines how it ends, and only clients whose updates count are trained. The clock starts at 0 with
the first round and advances by each round's duration; the server's own work takes no virtual
time.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from fedcore.config.run import RunConfig
from fedcore.config.simulated import DeviceClass
from fedcore.errors import DataError
from fedcore.observability.words import counted
from fedcore.seeds import derive
from server.records import VirtualRecord
from server.simulation.virtual.trace import Trace, read_trace, window_at

SILENCE_S = 60.0
"""How long a server waits, at most, for a device that it has lost. Flower's SuperLink marks a
node as offline when its last heartbeat is two intervals of 30 s old, and then replies for it."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class VirtualFleet:
    """Source of the virtual clients' devices; stores nothing per client, except in a trace."""

    seed: int
    classes: tuple[DeviceClass, ...]
    """Device classes; empty where there is a trace."""
    trace: Trace | None = None


@dataclass(frozen=True)
class VirtualDevice:
    """Speed and bandwidth of one client's device."""

    examples_per_s: float
    download_mbit_s: float
    """In 10^6 bits per second, like ``upload_mbit_s``."""
    upload_mbit_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Fate:
    """Simulated course of a round for one client; times are in seconds from the round's start."""

    client: str
    outcome: Literal["done", "unavailable", "dropped"]
    start_s: float
    """When it has the model and starts to train; like all other times, 0 if it is unavailable."""
    trained_s: float
    """When training ends."""
    finish_s: float
    """When its update arrives, or would have arrived."""
    lost_s: float
    """When contact is lost; infinite for a client that is done."""
    bytes_down: int
    """Bytes that the server sends, whether or not all arrive."""
    bytes_up: int
    """Bytes that the client sends: 0 unless it is done."""


@dataclass(frozen=True)
class VirtualRound:
    """Outcome of a round on the virtual clock."""

    finishers: tuple[str, ...]
    """Clients whose updates arrive in time, in the order of the request: the ones to train."""
    wasted_clients: tuple[str, ...]
    """Clients that start to train and whose updates do not count. Under privacy, their devices
    have already charged their ledgers."""
    record: VirtualRecord


def read_fleet(run: RunConfig, clients: Iterable[str]) -> VirtualFleet | None:
    """Returns the fleet that ``run.simulation`` describes; None where it describes none.

    Args:
        run: Configuration of the run.
        clients: All clients; read only where there is a trace.

    Raises:
        DataError: the trace cannot be read (see `read_trace`), or has no row for a client.
    """
    simulation = run.simulation
    if simulation.trace is None:
        return VirtualFleet(run.seed, simulation.devices) if simulation.devices else None
    path = run.path(simulation.trace)
    trace = read_trace(path)
    missing = next((client for client in clients if client not in trace.numbers), None)
    if missing is not None:
        raise DataError(
            f"{path}: client {missing!r} has no row in this trace, which lists "
            f"{counted(len(trace.numbers), 'client')}. Nothing was simulated; give every client "
            "at least one row."
        )
    return VirtualFleet(run.seed, (), trace)


def class_of(fleet: VirtualFleet, client: str) -> DeviceClass:
    """Returns the device class of a client, without a trace; a function of seed and name.

    Guarantee:
        A client is of a class with probability equal to the class's share, independently of other
        clients.
    """
    ends = list(itertools.accumulate(device.share for device in fleet.classes))
    drawn = _uniform(fleet.seed, "device class", client) * ends[-1]
    return fleet.classes[min(bisect_right(ends, drawn), len(ends) - 1)]


def device_of(fleet: VirtualFleet, client: str) -> VirtualDevice:
    """Returns the device of a client, without a trace; the same in every round.

    Guarantee:
        Speed and bandwidth are log-normal with the medians of the client's class.
    """
    kind = class_of(fleet, client)
    speed = _log_normal(kind.speed_spread, fleet.seed, "device speed", client)
    bandwidth = _log_normal(kind.bandwidth_spread, fleet.seed, "device bandwidth", client)
    return VirtualDevice(
        kind.examples_per_s * speed,
        kind.download_mbit_s * bandwidth,
        kind.upload_mbit_s * bandwidth,
        kind.latency_s,
    )


def is_reached(fleet: VirtualFleet, client: str, number: int, *, clock_s: float) -> bool:
    """Whether a client selected for round ``number`` is reachable; does not read its data."""
    if fleet.trace:
        return window_at(fleet.trace, client, clock_s) is not None
    words = ("device availability", number, client)
    return _uniform(fleet.seed, *words) < class_of(fleet, client).availability


def fate(
    fleet: VirtualFleet,
    client: str,
    number: int,
    *,
    clock_s: float,
    examples: int,
    epochs: float,
    bytes_down: int,
    bytes_up: int,
) -> Fate:
    """Simulates ``client`` in round ``number``: it downloads, trains and uploads, or is lost.

    A device of a class drops out with the class's probability, at a time uniform over its duration.
    A device of a trace is lost when its window ends before it finishes.

    Guarantee:
        Depends only on the arguments. For the same seed, client and round, a slower device, more
        work or more bytes never finish earlier.

    Args:
        fleet: Devices of the clients.
        client: Name of a client.
        number: Number of the round, from 1.
        clock_s: Virtual time at the start of the round.
        examples: Training examples of the client, at least 1; ignored where `is_reached` is false.
        epochs: Passes over the examples.
        bytes_down: Bytes that the server sends.
        bytes_up: Bytes that the client sends back.

    Raises:
        KeyError: the fleet's trace has no such client.
    """
    if not is_reached(fleet, client, number, clock_s=clock_s):
        return Fate(client, "unavailable", 0.0, 0.0, 0.0, lost_s=0.0, bytes_down=0, bytes_up=0)
    if fleet.trace:
        window = window_at(fleet.trace, client, clock_s)
        assert window is not None
        device = VirtualDevice(window.examples_per_s, window.download_mbit_s, window.upload_mbit_s)
    else:
        window, device = None, device_of(fleet, client)
    start_s = device.latency_s + _transfer_s(bytes_down, device.download_mbit_s)
    trained_s = start_s + examples * epochs / device.examples_per_s
    finish_s = trained_s + _transfer_s(bytes_up, device.upload_mbit_s)
    if window:
        lost_s = window.available_until_s - clock_s
        dropped = lost_s < finish_s
    else:
        dropout = class_of(fleet, client).dropout
        drawn = _uniform(fleet.seed, "device dropout", number, client)
        dropped = drawn < dropout
        lost_s = drawn / dropout * finish_s if dropped else math.inf  # uniform, given a dropout
    return Fate(
        client,
        "dropped" if dropped else "done",
        start_s,
        trained_s,
        finish_s,
        lost_s=lost_s if dropped else math.inf,
        bytes_down=bytes_down,
        bytes_up=0 if dropped else bytes_up,
    )


def first_of(fates: Sequence[Fate], count: int, *, deadline_s: float) -> list[Fate]:
    """Returns the fates of the first updates to arrive in time, at most ``count``, by arrival."""
    in_time = [one for one in fates if counts(one, deadline_s=deadline_s)]
    return sorted(in_time, key=lambda one: one.finish_s)[:count]


def resolve_round(
    fates: Sequence[Fate], *, deadline_s: float, enough: Sequence[Fate] = ()
) -> VirtualRound:
    """Determines how the round ends: which updates count, its duration and its traffic.

    Like a deployed server, it waits for each reached client until the client replies, has been lost
    for `SILENCE_S`, or the deadline passes.

    Args:
        fates: One per client that was asked.
        deadline_s: ``federation.deadline_s``, on the virtual clock; may be infinite.
        enough: Fates whose updates end the round, see `first_of`; other updates are late. Empty
            where the round waits for all.
    """
    if enough:
        deadline_s = enough[-1].finish_s
        names = {one.client for one in enough}
        counted = [one for one in fates if one.client in names]
    else:
        counted = [one for one in fates if counts(one, deadline_s=deadline_s)]
        names = {one.client for one in counted}
    others = [one for one in fates if one.client not in names]
    late = [one for one in others if one.outcome == "done"]
    answers_s = [one.finish_s for one in fates if one.outcome == "done"]
    losses_s = [one.lost_s + SILENCE_S for one in fates if one.outcome == "dropped"]
    return VirtualRound(
        finishers=tuple(one.client for one in counted),
        wasted_clients=tuple(one.client for one in others if has_started(one)),
        record=VirtualRecord(
            simulated_s=min(max(answers_s + losses_s, default=0.0), deadline_s),
            unavailable=sum(one.outcome == "unavailable" for one in fates),
            dropped=sum(one.outcome == "dropped" for one in fates),
            stragglers=len(late),
            bytes_down=sum(one.bytes_down for one in fates),
            bytes_up=sum(one.bytes_up for one in fates),
            bytes_wasted=sum(one.bytes_down + one.bytes_up for one in others),
        ),
    )


def has_started(one: Fate) -> bool:
    """Whether a client starts to train; under privacy, its device has then charged its ledger."""
    return one.start_s < one.lost_s


def counts(one: Fate, *, deadline_s: float) -> bool:
    """Whether a client's update arrives in time."""
    return one.outcome == "done" and one.finish_s <= deadline_s


def _transfer_s(count_bytes: int, mbit_s: float) -> float:
    return count_bytes * 8 / (mbit_s * 1e6)


def _log_normal(sigma: float, seed: int, *words: str | int) -> float:
    """Returns a log-normal draw with median 1."""
    return math.exp(sigma * _NORMAL.inv_cdf(_uniform(seed, *words)))


def _uniform(seed: int, *words: str | int) -> float:
    """Returns a draw strictly between 0 and 1, from 2^52 values; cheaper than a generator."""
    return ((derive(seed, *words) >> 11) + 0.5) / 2**52
