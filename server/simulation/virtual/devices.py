"""What becomes of the clients of a round on a virtual clock: who answers, when, and who is lost.

Nothing here computes or waits. A round asks for the `fate` of each client that it selected, settles
them, and trains the clients whose updates will count. The clock starts at 0 with the first round
and advances by what each round took; the server's own work takes no time on it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from fedcore.config.run import DeviceClass, RunConfig
from fedcore.errors import DataError
from fedcore.observability.words import counted
from fedcore.seeds import derive
from server.records import VirtualRecord
from server.simulation.virtual.trace import Trace, read_trace, window_at

SILENCE_S = 60.0
"""How long a server waits, at most, for a device that it has lost: Flower's SuperLink counts a node
as gone when its last heartbeat is two intervals of 30 s old, and answers for it."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class VirtualFleet:
    """Where the devices of virtual clients come from; holds nothing a client, but for a trace."""

    seed: int
    classes: tuple[DeviceClass, ...]
    """Empty where there is a trace."""
    trace: Trace | None = None


@dataclass(frozen=True)
class VirtualDevice:
    """The device of one client."""

    examples_per_s: float
    download_mbit_s: float
    """10^6 bits a second, as is ``upload_mbit_s``."""
    upload_mbit_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Fate:
    """What becomes of one selected client; times are seconds after the start of the round."""

    client: str
    outcome: Literal["done", "unavailable", "dropped"]
    begins_s: float
    """When it has the model and begins to train; 0 where it was never reached, as below."""
    trained_s: float
    """When it has trained."""
    finish_s: float
    """When its update has arrived, or would have."""
    lost_s: float
    """When contact with it was lost; infinite for one that is done."""
    bytes_down: int
    """What the server sent to it, whether or not all of it arrived."""
    bytes_up: int
    """What it sends: nothing unless it is done."""


@dataclass(frozen=True)
class VirtualRound:
    """How a round ends."""

    finishers: tuple[str, ...]
    """Clients whose updates came in time, in the order they were asked in: those to train."""
    begun_in_vain: tuple[str, ...]
    """Clients that began to train and whose updates do not count. Under privacy a device has
    charged its ledger by then."""
    record: VirtualRecord


def read_fleet(run: RunConfig, clients: Iterable[str]) -> VirtualFleet | None:
    """The fleet that ``run.simulation`` describes; None where it describes none.

    Args:
        run: The run.
        clients: All registered clients; looked at only where there is a trace.

    Raises:
        DataError: the trace cannot be read (`read_trace`), or lacks one of the clients.
    """
    simulation = run.simulation
    if simulation.trace is None:
        return VirtualFleet(run.seed, simulation.devices) if simulation.devices else None
    path = run.path(simulation.trace)
    trace = read_trace(path)
    missing = next((client for client in clients if client not in trace.numbers), None)
    if missing is not None:
        raise DataError(
            f"{path}: client {missing!r} has no row in this trace, which names "
            f"{counted(len(trace.numbers), 'client')}. Nothing was simulated; give every client "
            "at least one row."
        )
    return VirtualFleet(run.seed, (), trace)


def class_of(fleet: VirtualFleet, client: str) -> DeviceClass:
    """The class of a client of a fleet without a trace: it follows from seed and name alone.

    Guarantee:
        Each client is of a class with the probability of the class's share, independent of others.
    """
    ends = list(itertools.accumulate(device.share for device in fleet.classes))
    drawn = _uniform(fleet.seed, "device class", client) * ends[-1]
    return fleet.classes[min(bisect_right(ends, drawn), len(ends) - 1)]


def device_of(fleet: VirtualFleet, client: str) -> VirtualDevice:
    """The device of a client of a fleet without a trace, the same in every round.

    Guarantee:
        Speed is log-normal about the median of the client's class, and so is bandwidth.
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
    """Whether a client selected for round ``number`` answers at all; asks for none of its data."""
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
    epochs: int,
    bytes_down: int,
    bytes_up: int,
) -> Fate:
    """What becomes of ``client`` in round ``number``: it downloads, trains, uploads, or is lost.

    A device of a class vanishes with the class's probability, at a moment that is uniform over the
    time it would take. A device of a trace is lost when its window closes before it has finished.

    Guarantee:
        Depends on the arguments alone. For the same seed, client and round, a slower device, more
        work or more bytes never finish earlier.

    Args:
        fleet: Whose devices.
        client: One of its clients.
        number: Of the round, from 1.
        clock_s: The virtual clock when the round starts.
        examples: The client's examples for training, at least 1; ignored where `is_reached` is
            false.
        epochs: Passes over them.
        bytes_down: What the server sends to it.
        bytes_up: What it sends back.

    Raises:
        KeyError: the fleet's trace does not name the client.
    """
    if not is_reached(fleet, client, number, clock_s=clock_s):
        return Fate(client, "unavailable", 0.0, 0.0, 0.0, lost_s=0.0, bytes_down=0, bytes_up=0)
    if fleet.trace:
        window = window_at(fleet.trace, client, clock_s)
        assert window is not None
        device = VirtualDevice(window.examples_per_s, window.download_mbit_s, window.upload_mbit_s)
    else:
        window, device = None, device_of(fleet, client)
    begins_s = device.latency_s + _transfer_s(bytes_down, device.download_mbit_s)
    trained_s = begins_s + examples * epochs / device.examples_per_s
    finish_s = trained_s + _transfer_s(bytes_up, device.upload_mbit_s)
    if window:
        lost_s = window.available_until_s - clock_s
        dropped = lost_s < finish_s
    else:
        dropout = class_of(fleet, client).dropout
        drawn = _uniform(fleet.seed, "device dropout", number, client)
        dropped = drawn < dropout
        lost_s = drawn / dropout * finish_s if dropped else math.inf  # given that, uniform again
    return Fate(
        client,
        "dropped" if dropped else "done",
        begins_s,
        trained_s,
        finish_s,
        lost_s=lost_s if dropped else math.inf,
        bytes_down=bytes_down,
        bytes_up=0 if dropped else bytes_up,
    )


def first_of(fates: Sequence[Fate], count: int, *, deadline_s: float) -> list[Fate]:
    """Those whose updates are the first to arrive in time, ``count`` at most, by their arrival."""
    in_time = [one for one in fates if counts(one, deadline_s=deadline_s)]
    return sorted(in_time, key=lambda one: one.finish_s)[:count]


def settle(
    fates: Sequence[Fate], *, deadline_s: float, enough: Sequence[Fate] = ()
) -> VirtualRound:
    """How the round of these clients ends: who counts, how long it took, what it moved.

    The server waits as one in a deployment does: for every client that it reached, until it
    answers, until it has been lost for `SILENCE_S`, or until the deadline, whichever comes first.

    Args:
        fates: One for each client that was asked; of a client at most one.
        deadline_s: ``federation.deadline_s``, on the virtual clock; may be infinite.
        enough: Those with whose updates the round ended, see `first_of`; others are then late.
            Empty where it waited for all.
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
        begun_in_vain=tuple(one.client for one in others if begun(one)),
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


def begun(one: Fate) -> bool:
    """Whether a client begins to train. Under privacy a device has charged its ledger then."""
    return one.begins_s < one.lost_s


def counts(one: Fate, *, deadline_s: float) -> bool:
    """Whether a client's update arrives in time."""
    return one.outcome == "done" and one.finish_s <= deadline_s


def _transfer_s(count_bytes: int, mbit_s: float) -> float:
    return count_bytes * 8 / (mbit_s * 1e6)


def _log_normal(sigma: float, seed: int, *words: str | int) -> float:
    """A draw with median 1."""
    return math.exp(sigma * _NORMAL.inv_cdf(_uniform(seed, *words)))


def _uniform(seed: int, *words: str | int) -> float:
    """A draw strictly between 0 and 1, out of 2^52 equally likely: cheaper than a generator."""
    return ((derive(seed, *words) >> 11) + 0.5) / 2**52
