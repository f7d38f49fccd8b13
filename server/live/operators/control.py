"""Execution of operators' and viewers' requests on a run: pause, stop, drain, back up, inspect."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedcore.config.run import RunConfig
from fedcore.crypto.roster import Roster, ServerIdentity
from fedcore.errors import ConfigError, FedcoreError, ResourceError, TrustError
from fedcore.flower.fleet_grid import ServerStopped
from fedcore.observability.events import Event
from server.live.network.serve import Listening
from server.live.operators.backup import back_up, check_place, check_wanted
from server.live.operators.drained import check_drain, read_drained, warn_of_unknown, write_drained
from server.live.operators.evaluations import PendingEvaluations
from server.live.operators.protocol import READING, OperatorRequest, Requester, named, parse_request
from server.live.operators.recent_events import RecentEvents
from server.live.operators.status import devices_answer, status_answer
from server.live.rounds.steered import SteeredCheckpointer
from server.operator_log import AUDIT, Audit
from server.rounds.checkpointing.checkpointer import RoundCheckpointer
from server.rounds.checkpointing.progress import Progress

_POLL_S = 0.25
"""Interval at which waiting code checks whether the server stops, in seconds."""
_THREADS = 4
"""Threads that answer requests; at most one of them waits for the end of a round."""
Disconnected = Callable[[], bool]
"""Returns whether the client that sent a request has disconnected."""
_State = Literal["waiting", "running", "paused", "finishing", "ended"]


@dataclass(frozen=True)
class _Site:
    """Objects that exist only while the server is up."""

    identity: ServerIdentity
    listening: Listening | None
    """The network server; None once the rounds have ended and no devices are served."""
    roster: Roster
    audit: Audit

    @property
    def stopping(self) -> bool:
        return self.listening is not None and self.listening.stopping.is_set()


class Control:
    """Executes operators' requests on one run. All methods may be called from any thread."""

    def __init__(self, run: RunConfig, *, identity: Path, results: Path) -> None:
        """Starts in the state "waiting": neither paused nor stopped.

        Args:
            run: The run's configuration.
            identity: The server's folder, with the audit log and the list of drained devices.
            results: The run's own folder.

        Raises:
            DiskFull: there is no room for the audit log.
            DataError: the list of drained devices is malformed.
        """
        self._run, self._folder, self._results = run, identity, results
        Audit(identity / AUDIT).close()  # fails early if the audit log is not writable
        self._changed = threading.Condition()
        self._recent = RecentEvents()
        self._state: _State = "waiting"
        self._pause = self._stop = False
        self._hold = False
        """Whether a backup waits for the end of the round, or is being written."""
        self._awaits_devices = False
        """Whether the current round waits for devices, so that a backup may be taken meanwhile."""
        self._answering = 0
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="operators")
        """Threads for `answer`; separate, so that waiting operators do not block devices."""
        self._started = time.monotonic()
        self._drained = read_drained(identity)
        self.evaluations = PendingEvaluations()
        self._site: _Site | None = None

    @property
    def drained(self) -> frozenset[str]:
        """Names of drained devices, which further rounds do not select."""
        return self._drained

    @property
    def stopped(self) -> bool:
        """Whether the run has been asked to stop, so that it can be resumed later."""
        return self._stop

    @property
    def last_round(self) -> int:
        """Number of the last completed round; 0 before the first."""
        return self._recent.rounds[-1]["round"] if self._recent.rounds else 0

    def sink(self, event: Event) -> None:
        """Records an event, to be shown by ``status`` and ``rounds``."""
        with self._changed:
            self._recent.record(event)

    def open(self, identity: ServerIdentity, listening: Listening | None) -> None:
        """Starts to accept requests, and logs that to the audit log.

        ``listening`` is None for the steps after the rounds; a stop interrupts the main thread.
        """
        audit = Audit(self._folder / AUDIT)
        self._site = _Site(identity, listening, identity.roster(), audit)
        warn_of_unknown(self._drained, self._site.roster)
        action = "start"
        if listening is not None:
            listening.presence.drain(self._drained)
        else:
            action, self._recent.stage, self._state = "finish", "preparing", "finishing"
        audit.record(by="server", action=action, outcome="done", run=self._run.name)

    def close(self) -> None:
        """Waits until all requests are answered, off the event loop; aborts a pending backup."""
        with self._changed:
            site = self._site
            assert site is not None
            self._stop |= site.stopping
            self._show("ended")
            self._site = None
            self._changed.wait_for(lambda: not self._answering)
        last, name = self.last_round, self._run.name
        site.audit.record(by="server", action="end", outcome="done", run=name, round=last)
        site.audit.close()

    def steered(
        self, checkpointer: RoundCheckpointer, between: Callable[[], None] = lambda: None
    ) -> RoundCheckpointer:
        """Wraps ``checkpointer`` so that it pauses or stops on request, and calls ``between``."""
        waiting = self.allow_requests_while_waiting
        return SteeredCheckpointer(checkpointer, self._block_while_paused, waiting, between)

    def allow_requests_while_waiting(self) -> None:
        """Lets a stop or a backup proceed; called repeatedly while a round waits for devices.

        Blocks while a backup is being taken.

        Raises:
            Stopped: an operator stopped the run, or the server stops.
        """
        with self._changed:
            self._check_stopped()
            self._awaits_devices = True
            self._changed.notify_all()
            try:
                while self._hold:
                    self._changed.wait(_POLL_S)
                    self._check_stopped()
            finally:
                self._awaits_devices = False

    def answer(
        self, raw: bytes, sender: Requester, disconnected: Disconnected = lambda: False
    ) -> dict[str, Any]:
        """Executes a request and returns the answer; errors are returned in it, not raised."""
        with self._changed:
            self._answering += 1
        try:
            return {"ok": True, **self._answer(parse_request(raw), sender, disconnected)}
        except FedcoreError as error:
            return {"ok": False, "error": type(error).__name__, "message": str(error)}
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    def _answer(
        self, request: OperatorRequest, sender: Requester, disconnected: Disconnected
    ) -> dict[str, Any]:
        site = self._site
        if site is None:
            raise ResourceError("the server is still starting. Nothing was done; try again.")
        if request.verb in READING:
            return self._read_state(request, site)
        more = request.model_dump(exclude={"verb"}, exclude_defaults=True)

        def record(outcome: str) -> None:
            site.audit.record(by=sender.by, action=request.verb, outcome=outcome, **more)

        try:
            if sender.role != "operator":
                raise TrustError(
                    f"{sender.by}: a {sender.role} may only read, an operator may {request.verb}. "
                    "Nothing was done; ask an operator."
                )
            with named(request):
                act = self._act(request, sender, site, disconnected)
            record("accepted")  # on disk before the request is executed
            with named(request):
                answer = act()
        except FedcoreError as error:
            record(f"refused: {error}")
            raise
        if request.verb in ("backup", "evaluate"):
            record("done")
        return answer

    def _read_state(self, request: OperatorRequest, site: _Site) -> dict[str, Any]:
        if request.verb == "devices":
            return {"devices": devices_answer(site.roster, self._drained, site.listening)}
        with self._changed:
            rounds = list(self._recent.rounds)
        if request.verb == "rounds":
            return {"run": self._run.name, "rounds": rounds}
        return self._status(site, rounds)

    def _status(self, site: _Site, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return status_answer(
            self._run,
            site.identity,
            site.roster,
            site.listening,
            state=self._described(),
            stage=self._recent.stage,
            training=self._recent.training,
            waits=self._recent.waits if self._state in ("waiting", "running") else "",
            rounds=rounds,
            notes=self._recent.notes,
            drained=self._drained,
            up_s=time.monotonic() - self._started,
        )

    def _described(self) -> str:
        with self._changed:
            if self._stop and self._state != "ended":
                return "stopping"
            if self._pause and self._state in ("waiting", "running"):
                return "pausing"
            return self._state

    def _act(
        self, request: OperatorRequest, sender: Requester, site: _Site, disconnected: Disconnected
    ) -> Callable[[], dict[str, Any]]:
        """Validates a request and returns the function that executes it, without calling it."""
        listening = site.listening
        if listening is None:
            return self._finishing(request)
        if request.verb == "backup":
            return self._backup(request, sender, site, disconnected)
        if request.verb == "drain":
            return self._drain(request, site.roster, listening)
        if self._state == "ended":
            raise ConfigError(f"{self._run.name}: the run has ended. Nothing was done.")
        if request.verb == "evaluate":
            state = self._described
            return self.evaluations.act(self._run, request, sender, state, disconnected)
        if request.verb in ("pause", "resume"):
            return lambda: self._set(pause=request.verb == "pause", stop=self._stop)

        def stop() -> dict[str, Any]:
            if self._state == "waiting":  # no round has begun that would check for a stop
                listening.stop()
            return self._set(pause=False, stop=True)

        return stop

    def _finishing(self, request: OperatorRequest) -> Callable[[], dict[str, Any]]:
        """Validates a request after the rounds, when only a stop is possible."""
        if request.verb != "stop":
            raise ConfigError(
                f"{request.verb}: the rounds of {self._run.name!r} are complete, devices take no "
                f"further part, and its model is being finished ({self._recent.stage}). Nothing "
                "was done; `fedcore server stop` interrupts that, and --resume continues it."
            )

        def stop() -> dict[str, Any]:
            answer = self._set(pause=False, stop=True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            return answer

        return stop

    def _set(self, *, pause: bool, stop: bool) -> dict[str, Any]:
        with self._changed:
            self._pause, self._stop = pause, stop
            self._changed.notify_all()
            if not pause and not stop:
                self._changed.wait_for(lambda: self._state != "paused", timeout=2 * _POLL_S)
        return {"run": self._run.name, "state": self._described()}

    def _drain(
        self, request: OperatorRequest, roster: Roster, listening: Listening
    ) -> Callable[[], dict[str, Any]]:
        known = {m.name: m for m in roster.members() if m.role == "device"}
        name = request.device or ""
        if name not in known and not (request.undo and name in self._drained):
            raise ConfigError(
                f"{name or 'drain'}: no device of this project has this name. Nothing was done; "
                "list them with `fedcore server devices`."
            )
        if not request.undo:
            with self._changed:
                last = self._recent.rounds[-1] if self._recent.rounds else None
            needed = self._run.federation.cohort or (last["cohort"] if last else 1)
            connected = [one.name for one in listening.presence.devices() if one.online]
            check_drain(self._run, name, connected, self._drained, cohort=needed)

        def act() -> dict[str, Any]:
            with self._changed:  # another operator may drain at the same time
                wanted = self._drained - {name} if request.undo else self._drained | {name}
                write_drained(self._folder, wanted)
                self._drained = wanted
            listening.presence.drain(self._drained)
            return {"device": name, "drained": not request.undo}

        return act

    def _backup(
        self, request: OperatorRequest, sender: Requester, site: _Site, disconnected: Disconnected
    ) -> Callable[[], dict[str, Any]]:
        file = Path(request.file or "")
        if not sender.local:
            raise ConfigError(
                "backup: it can only be requested on the server's own machine. Nothing was "
                "written; log in there, and pass the server's folder with --identity."
            )
        check_place(file)

        def act() -> dict[str, Any]:
            def wanted() -> None:
                check_wanted(self._run.name, disconnected=disconnected(), ends=site.stopping)

            with self._between_rounds(site, disconnected):
                return asdict(back_up(self._results, file, now=datetime.now(UTC), wanted=wanted))

        return act

    @contextmanager
    def _between_rounds(self, site: _Site, disconnected: Disconnected) -> Iterator[None]:
        """Waits until no round is active, or it waits for devices; blocks rounds until exit.

        Raises:
            ResourceError: another backup is pending, the client disconnected, or the run ends.
        """
        with self._changed:
            if self._hold:
                raise ResourceError(
                    "backup: another one is being written, or waits for the end of this round. "
                    "Nothing was written; try again when it is done, or cancel it with Ctrl-C."
                )
            self._hold = True
        try:
            with self._changed:
                self._check_waited_for(site, disconnected)
                while self._state == "running" and not self._awaits_devices:
                    self._changed.wait(_POLL_S)
                    self._check_waited_for(site, disconnected)
            yield
        finally:
            with self._changed:
                self._hold = False
                self._changed.notify_all()

    def _check_waited_for(self, site: _Site, disconnected: Disconnected) -> None:
        ends = self._stop or self._state == "ended" or site.stopping
        check_wanted(self._run.name, disconnected=disconnected(), ends=ends)

    def _check_stopped(self) -> None:
        if self._site is None or self._site.stopping:
            raise ServerStopped("the server is stopping")
        if self._stop:
            raise ServerStopped("an operator stopped the run")

    def _block_while_paused(self, progress: Progress, between: Callable[[], None]) -> None:
        """Blocks while the run is paused or a backup is taken; calls ``between`` repeatedly.

        Raises:
            Stopped: an operator stopped the run, or the server stops.
        """
        while True:
            between()
            with self._changed:
                if progress.over:
                    return self._show("finishing")
                if not (self._hold or (self._pause and not self._stop)):
                    self._check_stopped()
                    return self._show("running")
                self._show("paused")
                self._changed.wait(_POLL_S)
                self._check_stopped()

    def _show(self, state: _State) -> None:
        if self._state != state:
            self._state = state
            self._changed.notify_all()
