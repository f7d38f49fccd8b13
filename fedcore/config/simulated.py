"""Settings of a simulation: how virtual clients are trained, and what devices they stand for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedcore.config.patterns import NAME
from fedcore.config.section import Section

RATE_MIN, RATE_MAX = 1e-6, 1e12  # so that no time computed from a rate is zero or infinite
Rate = Annotated[float, Field(ge=RATE_MIN, le=RATE_MAX)]
Spread = Annotated[float, Field(ge=0, le=3)]


class DeviceClass(Section):
    """``[[simulation.devices]]``: one kind of device among the virtual clients."""

    name: Annotated[str, Field(pattern=NAME)]
    """The name of the class; each name is used once."""
    share: Rate = 1.0
    """How many of the clients are of this class, relative to the other classes' shares."""
    examples_per_s: Rate
    """Median speed of local training, as measured on such a device with this run's settings."""
    speed_spread: Spread = 0.0
    """Sigma of a log-normal over devices. At 0 all have the same speed; at 0.5 one device in six is
    slower than 0.6 times the median."""
    download_mbit_s: Rate = 50.0
    """Median bandwidth from the server to a device, in 10^6 bits a second."""
    upload_mbit_s: Rate = 10.0
    """Median bandwidth from a device to the server, in 10^6 bits a second."""
    bandwidth_spread: Spread = 0.0
    """Sigma of a log-normal over devices; one draw per device, for both directions."""
    latency_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """Seconds from the start of a round until a device begins to download: polling, waking up."""
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that a device can be reached when it is selected."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a device disconnects during a round that it takes part in."""


class Simulation(Section):
    """``[simulation]``: how virtual clients are trained; unused in a deployment."""

    training: Literal["auto", "loop", "vectorised"] = "auto"
    """``loop``: one client after the other, by the app that devices run. ``vectorised``: many
    clients at once in batched computation. ``auto``: the faster of the two on the first clients.
    The result is the same up to the order of float32 sums."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that train at the same time, one thread each. 0: as many as there are cores, or
    only the main process when rounds are short."""
    engine: Literal["local", "ray"] = "local"
    """Where workers run: in processes on this machine, or in actors of a Ray cluster."""
    devices: tuple[DeviceClass, ...] = ()
    """Device classes; the seed and a client's name determine its class. Without classes and without
    a trace there is no virtual clock, and every client replies."""
    trace: str | None = None
    """A CSV file with each client's speed, bandwidth and hours in place of ``devices``, relative
    to this file."""
