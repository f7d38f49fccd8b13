"""The agent that keeps a device's models current: ``fedcore device run``.

It waits for word of a release, installs what is new, checks the health of what serves, returns to
the version before when it falls, and tells the server what became of each version. It serves
nothing itself: while it is away, offline or refused, the installed versions keep answering.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.delivery import store as installed
from edge_client.delivery.clock import stale_since
from edge_client.delivery.feedback import tell_feedback
from edge_client.delivery.health import (
    STRIKES,
    HealthBaseline,
    HealthCheck,
    check_health,
    read_baseline,
    read_served,
    reason_to_return,
    write_baseline,
)
from edge_client.delivery.held import finish_return, read_held, return_to_previous
from edge_client.delivery.outbox import PendingReport, put_report, send_reports
from edge_client.delivery.places import ReleasePlace, linked, opened_place
from edge_client.delivery.store import Installed, Record
from edge_client.delivery.update import update
from edge_client.inference.process import ModelLimits
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.errors import (
    ConfigError,
    DeviceError,
    FedcoreError,
    RepositoryUnreachable,
    ResourceError,
    SelfTestFailed,
)
from fedcore.rpc.jitter import spread_s

if TYPE_CHECKING:
    from edge_client.delivery.network import DeliveryLink

log = logging.getLogger("fedcore.device")

_FIRST_S, _LONGEST_S = 1.0, 300.0
"""Pauses after failures: each twice the one before, up to the longest; jittered."""
_MAX_SPREAD_S = 600.0
"""Longest wait that a server may ask for after a release."""
_LEAST_S = 2.0
"""Least pause between two looks at the repository, whatever the server says."""


@dataclass(frozen=True)
class Following:
    """What an agent keeps current, and from where."""

    place: ReleasePlace
    store: Path
    models: tuple[str, ...]
    root: bytes | None
    """The root that the owner gives; the first update needs it."""
    threads: int
    limits: ModelLimits
    look_s: float
    """Longest time between two looks at the repository; a server's word makes it look at once."""
    health_s: float
    """Seconds between two health checks."""
    owner: OwnerPolicy = OPEN_POLICY
    """Says whether the server may be told how models are used here."""


@dataclass
class AgentState:
    """What an agent remembers while it runs."""

    stop: threading.Event = field(default_factory=threading.Event)
    changed: threading.Event = field(default_factory=threading.Event)
    """Set when the server says that the repository changed, or when a wait must end."""
    spread_s: float = 0.0
    """Seconds over which the server wants devices to spread."""
    strikes: dict[str, int] = field(default_factory=dict)
    """Failed health checks in a row, by model."""
    served: dict[str, tuple[Record, tuple[int, int]]] = field(default_factory=dict)
    """Version, and its requests and errors, at the last check, by model."""


def follow(following: Following, state: AgentState) -> None:
    """Keeps models current until ``state.stop`` is set.

    Errors of a release, the network or the server are logged and tried again later, at growing
    intervals. The installed versions serve meanwhile.

    Raises:
        ConfigError: the place or a model's name is not valid, or no root is trusted yet.
        CertificateRefused: the kit is not valid, or not that of a device.
        DataError: there is no kit.
    """
    following.place.check()
    if following.place.server is not None:
        with linked(following.place, state.stop):  # reads the kit: raises what is wrong with it
            pass
        threading.Thread(target=_hear, args=(following, state), daemon=True).start()
    failures, look_at_s, check_at_s = 0, 0.0, time.monotonic() + following.health_s
    while not state.stop.is_set():
        if state.changed.is_set() or time.monotonic() >= look_at_s:
            state.changed.clear()
            failures = 0 if look(following, state) else failures + 1
            pause_s = _backoff_s(failures) if failures else spread_s(following.look_s, 0.8, 1.0)
            look_at_s = time.monotonic() + pause_s
        if time.monotonic() >= check_at_s:
            check_all(following, state)
            check_at_s = time.monotonic() + spread_s(following.health_s, 0.8, 1.0)
        if following.place.server is not None:
            _send(following, state)
        _wait(state, min(look_at_s, check_at_s) - time.monotonic())


def look(following: Following, state: AgentState) -> bool:
    """Installs what is new; returns whether everything is current.

    Raises:
        ConfigError: a model's name is not valid, or no root is trusted yet.
    """
    current = True
    try:
        with opened_place(following.place, state.stop) as source:
            for model in following.models:
                with suppress(FedcoreError):  # told by the update
                    finish_return(following.store, model)
                try:
                    done = update(
                        source,
                        store=following.store,
                        model=model,
                        root=following.root,
                        threads=following.threads,
                        limits=following.limits,
                        respect=("returned", "refused"),
                        identity=following.place.identity(),
                    )
                except (ConfigError, RepositoryUnreachable):
                    raise
                except SelfTestFailed as error:
                    log.warning("%s", error)
                    _report_held(following, model)
                except FedcoreError as error:
                    current = False
                    log.warning("%s: %s", type(error).__name__, error)
                else:
                    _tell_update(following, model, done.version, done.changed, done.held)
    except ConfigError:
        raise
    except FedcoreError as error:
        current = False
        log.warning("offline: %s", error)
        for model in following.models:
            if since := stale_since(following.store / "trust"):
                log.warning("%s: stale: its release has not been confirmed since %s", model, since)
    return current


def check_all(following: Following, state: AgentState) -> None:
    """Checks the health of what serves, and returns to the version before where it fell."""
    for model in following.models:
        try:
            _check(following, state, model)
        except (DeviceError, ResourceError) as error:  # no version, an update, or no process
            log.info("health of %s: %s", model, error)
        except FedcoreError as error:
            log.warning("health of %s: %s: %s", model, type(error).__name__, error)


def _check(following: Following, state: AgentState, model: str) -> None:
    store = following.store
    version = installed.serving(store, model)
    if version.damage is not None:
        return  # the version before serves already; an update mends it
    found = _checked(following, version)
    baseline = read_baseline(store, model, version.record)
    if baseline is None and found.golden_error is not None and found.p50_us is not None:
        baseline = HealthBaseline(
            record=version.record, golden_error=found.golden_error, p50_us=found.p50_us
        )
        write_baseline(store, model, baseline)
    if baseline is None:  # it passed its self-test, and fails since
        baseline = HealthBaseline(record=version.record, golden_error=0.0, p50_us=float("inf"))
    before = _previous(store, model, version)
    since = _served_since(state, model, version.record, read_served(store, model, version.record))
    why = reason_to_return(baseline, found, None, since)
    if why is not None and before is not None and not found.failure:
        why = reason_to_return(baseline, found, _checked(following, before), since)
    state.strikes[model] = state.strikes.get(model, 0) + 1 if why else 0
    if why is None:
        return
    log.warning("%s: version %d: %s", model, version.manifest.version, why)
    if state.strikes[model] < STRIKES or before is None:
        return
    state.strikes[model] = 0
    record = return_to_previous(store, model, why)
    log.warning("%s: returned to version %d", model, record.version)
    _report(
        following,
        PendingReport(
            model=model,
            version=version.manifest.version,
            outcome="returned",
            reason=why[:500],
            golden_error=found.golden_error,
            p50_us=found.p50_us,
        ),
    )


def _served_since(
    state: AgentState, model: str, record: Record, served: tuple[int, int]
) -> tuple[int, int]:
    """Returns a version's requests and errors since the last check; zeros at its first."""
    before, last = state.served.get(model, (record, served))
    state.served[model] = (record, served)
    if before != record:
        return 0, 0
    if served[0] < last[0]:  # the server was started again
        return served
    return served[0] - last[0], served[1] - last[1]


def _checked(following: Following, version: Installed) -> HealthCheck:
    return check_health(version, threads=following.threads, limits=following.limits)


def _previous(store: Path, model: str, version: Installed) -> Installed | None:
    """Returns the intact version before; None if there is none."""
    try:
        before = installed.read(store, model, "previous")
    except FedcoreError:
        return None
    return before if before.record != version.record else None


def _tell_update(
    following: Following, model: str, version: int, changed: bool, held: str | None
) -> None:
    if held:
        log.info("%s: version %d serves; %s", model, version, held)
    if not changed:
        return
    log.info("%s: version %d is active", model, version)
    found = _checked(following, serving := installed.serving(following.store, model))
    if found.golden_error is not None and found.p50_us is not None:
        write_baseline(
            following.store,
            model,
            HealthBaseline(
                record=serving.record, golden_error=found.golden_error, p50_us=found.p50_us
            ),
        )
    _report(
        following,
        PendingReport(
            model=model,
            version=version,
            outcome="activated",
            golden_error=found.golden_error,
            p50_us=found.p50_us,
        ),
    )


def _report_held(following: Following, model: str) -> None:
    held = read_held(following.store, model)
    if held is not None:
        _report(
            following,
            PendingReport(
                model=model,
                version=held.record.version,
                outcome=held.outcome,
                reason=held.reason,
            ),
        )


def _report(following: Following, report: PendingReport) -> None:
    if following.place.server is not None:
        put_report(following.store, report)


def _send(following: Following, state: AgentState) -> None:
    try:
        with linked(following.place, state.stop) as link:
            send_reports(following.store, link)
            for model in following.models:
                _send_feedback(following, model, link)
    except FedcoreError as error:
        log.info("reports wait: %s", error)


def _send_feedback(following: Following, model: str, link: DeliveryLink) -> None:
    try:
        tell_feedback(following.store, model, link, owner=following.owner)
    except FedcoreError as error:  # of one model: the others are told all the same
        log.info("%s: counts of what was served wait: %s", model, error)


def _hear(following: Following, state: AgentState) -> None:
    """Waits for word of changes, and opens the stream again when it breaks off, until stopped."""
    failures = 0
    while not state.stop.is_set():
        try:
            with linked(following.place, state.stop) as link:
                for call in link.watch():
                    failures = 0
                    state.spread_s = min(call.spread_ms / 1000, _MAX_SPREAD_S)
                    state.changed.set()
                    if state.stop.is_set():
                        return
        except FedcoreError as error:
            log.debug("no stream: %s", error)
        failures += 1
        state.stop.wait(_backoff_s(failures))


def _wait(state: AgentState, pause_s: float) -> None:
    """Waits for a time, or until the server tells of a change, which devices then spread over."""
    if state.stop.wait(_LEAST_S):
        return
    if state.changed.wait(max(pause_s - _LEAST_S, 0.0)) and not state.stop.is_set():
        state.stop.wait(spread_s(state.spread_s, 0.0, 1.0))


def _backoff_s(failures: int) -> float:
    return spread_s(min(_FIRST_S * 2.0 ** min(failures, 16), _LONGEST_S), 0.5, 1.0)
