"""A run over devices that connect: what ``fedcore server start`` does.

Nothing imported at the top of this file brings torch: that takes seconds, and a server that goes on
with a run answers its devices before. What rounds need is imported in their own thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from flwr.serverapp import Grid

from fedcore.config.run import RunConfig
from fedcore.crypto.roster import ServerIdentity, load_server_identity
from fedcore.errors import ConfigError, FedcoreError, ResourceError, TaskError
from fedcore.files import write_atomic
from fedcore.flower.identity import server_context
from fedcore.observability.console import choose
from fedcore.observability.events import Noted, RoundFinished, Sink, StageAdvanced, tee
from fedcore.observability.jsonl import json_lines
from fedcore.observability.patience import FIRST_STEP, loading_told, told_if_slow
from fedcore.rpc.hello import declared_name, hello_of
from fedcore.seeds import Randomness, SystemEntropy
from server.live.journal.journal import Journal, Reached, nothing
from server.live.network.members import Members, devices_of
from server.live.network.serve import Address, listen, run_beside
from server.live.operators.control import Control
from server.live.operators.endpoint import check_socket, operated, operated_meanwhile, over_network
from server.live.resume import Complete, has_journal, open_run
from server.live.rounds.journaled import REJOIN_S, Admit, JournalGrid, JournalKeeper
from server.live.rounds.settings import device_settings
from server.live.rounds.waiting import Tell
from server.process.memory import loading
from server.process.signals import insistent
from server.records import RoundRecord
from server.report.folder import check_outside
from server.rounds.checkpointing import Peers

if TYPE_CHECKING:
    from fedcore.task.definition import Task
    from server.cloud import CloudData
    from server.rounds.app import Outcome


@dataclass(frozen=True)
class Deployment:
    """What an operator asks for."""

    run: RunConfig
    identity: Path
    host: str
    port: int | None
    """The one that the server's certificate was made with, when None."""
    wake_port: int | None
    """The one after ``port``, when None."""
    runs: Path
    json: bool
    resume: bool = False
    """Go on with a run that did not end, where there is one."""
    fresh: bool = False
    """Begin again, whatever there is."""

    def address(self, identity: ServerIdentity) -> Address:
        """Where to listen.

        Raises:
            ConfigError: there is no port after ``port``, and no other is named.
        """
        port = identity.port if self.port is None else self.port
        if self.wake_port is None and port == 2**16 - 1:
            raise ConfigError(
                f"server: it listens on port {port}, and devices are woken on the port after, "
                "which there is none of. Nothing was started; name another with --wake-port."
            )
        wake_port = (port + 1 if port else 0) if self.wake_port is None else self.wake_port
        return Address(self.host, port, wake_port)


def run_deployment(
    deployment: Deployment,
    control: Control,
    out: TextIO,
    *,
    randomness: Randomness | None = None,
    reached: Reached = nothing,
) -> bool:
    """Serves until the run is over; False when it was stopped before.

    A run that was over before, and is to be gone on with, is said to be, and nobody is served.

    The best model lies in the run's folder as ``global.safetensors``. Where the run names a
    repository, what `server.live.finish` does follows, once no device is served any more.

    A run that begins has its task loaded and all that it needs looked at before a folder is
    emptied, so that a mistake, or a port that is taken, disturbs nobody. One that goes on was begun
    with the same task file, and answers devices while that is loaded; none of them is asked
    anything before.

    Args:
        deployment: What is to be done.
        control: Steers it.
        out: Where events are shown.
        randomness: Of the server; the operating system's when None.
        reached: Hears of the journal's points.

    Raises:
        FedcoreError: whatever stops it. What the journal holds stands.
    """
    try:
        return _serve(deployment, control, out, randomness=randomness, reached=reached)
    except Complete as over:
        with choose(out, json=deployment.json) as shown:
            shown(Noted(str(over)))
        return True


def _serve(
    deployment: Deployment,
    control: Control,
    out: TextIO,
    *,
    randomness: Randomness | None,
    reached: Reached,
) -> bool:
    run = deployment.run
    identity = load_server_identity(deployment.identity)
    path = run.path(run.task)
    load = cache(partial(_load, path))
    goes_on = deployment.resume and has_journal(run, deployment.runs)
    name = (declared_name(path) if goes_on else None) or load().name
    releases = run.release.repository is not None
    read: list[CloudData | None] = []  # what the check of a start has read is not read again
    if not goes_on:
        with insistent():
            task = load()
            with told_if_slow(FIRST_STEP) if run.private else nullcontext():
                there = [one.name for one in devices_of(identity.roster()).values()]
                read.append(_check_begins(run, task, deployment.runs / run.name, there))
    elif run.federation.initial is not None:
        check_outside(run.path(run.federation.initial), deployment.runs / run.name)
    address = deployment.address(identity)
    address.check_free()
    check_socket(identity)
    identity.roster()  # refuses a list that is no list of this project's members
    outcomes: list[Outcome] = []
    with (
        open_run(
            run, deployment.runs, resume=deployment.resume, fresh=deployment.fresh, reached=reached
        ) as (folder, journal),
        json_lines(folder / "metrics.jsonl") as lines,
        choose(out, json=deployment.json) as shown,
    ):
        if journal.start is None:
            load()  # it died before its first round was whole: as if it had not begun
        kept = tee(lines, control.sink)
        emit = tee(kept, shown)
        for record in journal.start.records if journal.start else ():
            kept(_finished(record))
        for note in _resumed(journal):
            emit(Noted(note))

        def work(members: Members, peers: Peers, grid: Grid) -> None:
            over = _journaled(grid, run, journal, members.admit, control, peers, emit)
            task = load()
            cloud = read.pop() if read else _read_cloud(run, task)
            _federate(
                run,
                task,
                cloud,
                over,
                journal,
                members,
                peers,
                folder,
                emit,
                control,
                randomness,
                outcomes,
            )

        hello = hello_of(name, path)
        settings = device_settings(run, instance=journal.instance)
        spool = folder / "incoming"

        async def serve() -> bool:
            operate = over_network(control)
            async with (
                listen(
                    identity, hello, address, settings=settings, spool=spool, operate=operate
                ) as listening,
                operated(control, identity, listening),
            ):
                members = Members(identity.roster(), listening.fleet)
                return await run_beside(partial(work, members, listening.peers), listening)

        if not (journal.ended or asyncio.run(serve())):
            return False
        if releases:
            if control.stopped:  # when the last round was as good as over
                return False
            with operated_meanwhile(control, identity):
                from server.live.finish import finish
                from server.live.judge import JudgeOnDevices
                from server.rounds.app import outcome_of
                from server.rounds.judging import clients_judge

                if not outcomes:
                    assert journal.start is not None  # its rounds ended in a process before
                    outcomes.append(outcome_of(run, load(), journal.start))
                judge = None
                if clients_judge(run):
                    judge = JudgeOnDevices(
                        run=run,
                        task=load(),
                        identity=identity,
                        hello=hello,
                        address=address,
                        settings=settings,
                        spool=spool,
                        drained=lambda: control.drained,
                        emit=emit,
                    )
                finish(run, load(), outcomes[0], folder, emit, judge=judge)
        return True


def _check_begins(
    run: RunConfig, task: Task, folder: Path, devices: Sequence[str]
) -> CloudData | None:
    """Refuses a run that could only fail after the results in ``folder`` were replaced.

    Returns the cloud's data, which it has read for that.

    Raises:
        FedcoreError: whatever would have stopped it.
    """
    from server.live.finish import check_finish
    from server.preflight import check_rounds

    check_rounds(run, task, folder, clients=devices)
    if run.release.repository is not None:
        return check_finish(run, task)
    return _read_cloud(run, task)


def _read_cloud(run: RunConfig, task: Task) -> CloudData | None:
    from fedcore.task.definition import data_folder
    from server.cloud import read_cloud_data

    return read_cloud_data(task, data_folder(), holdout=run.finetune.holdout, seed=run.seed)


def _load(path: Path) -> Task:
    """The task, which is called what devices are told while it is being loaded.

    Raises:
        TaskError: it cannot be loaded, or goes by another name than its file says.
    """
    with loading_told(), loading():
        import server.rounds.app  # noqa: F401 - what rounds need, beside the task itself
        from fedcore.task.definition import load_task

        task = load_task(path)
    declared = declared_name(path)
    if declared not in (None, task.name):
        raise TaskError(
            f"{path}: the file says `task = Task(name={declared!r}, ...)`, and the task is called "
            f"{task.name!r}. Nothing was trained; write its name out there, and start again."
        )
    return task


def _federate(
    run: RunConfig,
    task: Task,
    cloud: CloudData | None,
    grid: Grid,
    journal: Journal,
    members: Members,
    peers: Peers,
    folder: Path,
    emit: Sink,
    control: Control,
    randomness: Randomness | None,
    outcomes: list[Outcome],
) -> None:
    from fedcore.task.model import checkpoint_bytes
    from server.rounds.app import Listener, server_app

    settings, start = run.federation, journal.start

    def keep(outcome: Outcome) -> None:
        path = folder / "global.safetensors"
        write_atomic(path, checkpoint_bytes(outcome.model))
        journal.end()
        outcomes.append(outcome)
        emit(Noted(f"round {outcome.federated.best_round} is the best; its model is in {path}"))

    keeper = JournalKeeper(
        journal,
        tell=lambda record: emit(_finished(record)),
        deadline_s=settings.deadline_s,
        weights=members.weights,
        evaluated=settings.evaluate_cohort,
        rejoin_s=_rejoin_s(journal),
        waits=_awaits(journal, emit),
    )
    listener = Listener(
        on_note=lambda text: emit(Noted(text)),
        on_round=keeper.record,
        on_end=keep,
        on_wait=_awaits(journal, emit),
    )
    app = server_app(
        task,
        run,
        cloud=cloud,
        randomness=randomness or SystemEntropy(),
        listener=listener,
        keeper=control.steered(keeper),
        start=start,
        peers=peers,
        awaited=lambda: members.count(drained=control.drained),
    )
    try:
        app(grid, server_context(grid.run.run_id))
    except ResourceError:
        raise  # this machine's: the round goes on as it was once that is mended
    except FedcoreError:
        journal.drop()  # whoever resumes asks those who are there then
        raise


def _journaled(
    grid: Grid,
    run: RunConfig,
    journal: Journal,
    admit: Admit,
    control: Control,
    peers: Peers,
    emit: Sink,
) -> JournalGrid:
    return JournalGrid(
        grid,
        journal,
        admit=admit,
        quorum=run.federation.quorum / run.federation.over_selection,  # of all who are asked
        rejoin_s=_rejoin_s(journal),
        lacks=control.lacks_devices,
        waits=_awaits(journal, emit),
        name=peers.name,
    )


def _awaits(journal: Journal, emit: Sink) -> Tell:
    """Shows what a round waits for; it is progress, and kept nowhere."""
    return lambda text: emit(StageAdvanced("rounds", journal.round, text))


def _rejoin_s(journal: Journal) -> float:
    """How long devices that were asked before may take to find this server again."""
    return REJOIN_S if journal.start else 0.0


def _finished(record: RoundRecord) -> RoundFinished:
    return RoundFinished(asdict(record))


def _resumed(journal: Journal) -> list[str]:
    """What is to be said of a run that goes on."""
    notes = [journal.mended] if journal.mended else []
    if journal.start is not None:
        notes.append(f"Resumed after round {journal.round}.")
    return notes
