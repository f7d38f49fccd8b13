"""A deployment from start to finish: the implementation of ``fedcore server start``.

`run_deployment` checks the configuration, opens the run's folder and journal, serves devices while
the rounds run in a thread, and then fine-tunes, compresses and publishes the model.

No module-level import here imports torch, which takes seconds: a server that resumes a run answers
its devices before that. The thread of the rounds imports what they need.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, TextIO

from flwr.serverapp import Grid

from fedcore.crypto.roster import load_server_identity
from fedcore.observability.console import choose
from fedcore.observability.events import Noted, RoundFinished, tee
from fedcore.observability.jsonl import json_lines
from fedcore.observability.patience import FIRST_STEP, note_if_slow
from fedcore.rpc.hello import declared_name, hello_of
from fedcore.seeds import Randomness, SystemEntropy
from server.delivery.serve import serve_releases
from server.live.deployment import Deployment, LiveRun
from server.live.inputs import Inputs
from server.live.journal.journal import Journal, OnPoint, ignore_point
from server.live.network.members import Members, devices_of
from server.live.network.serve import listen, run_beside
from server.live.operators.control import Control
from server.live.operators.endpoint import (
    check_socket,
    operator_handler,
    serve_operators,
    serve_operators_in_thread,
)
from server.live.resume import RunComplete, has_journal, open_run
from server.live.rounds.settings import device_settings
from server.process.signals import interrupt_then_exit
from server.report.folder import check_outside
from server.report.mlflow_runs import mlflow_run
from server.rounds.peers import Peers

if TYPE_CHECKING:
    from server.rounds.app import Outcome


def run_deployment(
    deployment: Deployment,
    control: Control,
    out: TextIO,
    *,
    randomness: Randomness | None = None,
    on_point: OnPoint = ignore_point,
) -> bool:
    """Runs a deployment to its end; returns False if an operator or a signal stopped it earlier.

    Writes the best model to ``global.safetensors`` in the run's folder. If the run names a
    repository, the server then stops serving devices, and `server.live.finish` fine-tunes,
    compresses and publishes the model. Resuming a run that is already complete only prints that
    it is, and serves nobody.

    A new run loads its task and checks all of its inputs and its ports before it empties a folder,
    so that a mistake destroys nothing. A resumed run was checked when it began: it answers devices
    while the task loads, and sends them work only afterwards.

    Args:
        deployment: The operator's options.
        control: Serves operators, who pause, stop and inspect the run.
        out: Stream that events are printed to.
        randomness: Source of the server's randomness; the operating system's when None.
        on_point: Called at each of the journal's `POINTS`; for tests of crashes.

    Raises:
        FedcoreError: an error ended the run. The journal stays valid, and the run can be resumed.
    """
    try:
        with _opened(deployment, control, out, randomness or SystemEntropy(), on_point) as live:
            outcome = None
            if not live.journal.ended and (outcome := asyncio.run(_serve(live))) is None:
                return False
            return live.run.release.repository is None or _finish(live, outcome)
    except RunComplete as over:
        with choose(out, json=deployment.json) as shown:
            shown(Noted(str(over)))
        return True


@contextmanager
def _opened(
    deployment: Deployment,
    control: Control,
    out: TextIO,
    randomness: Randomness,
    on_point: OnPoint,
) -> Iterator[LiveRun]:
    """Checks a deployment and opens its run; closes the folder and the journal on exit."""
    run, runs = deployment.run, deployment.runs
    identity = load_server_identity(deployment.identity)
    inputs, path = Inputs(run), run.path(run.task)
    resumes = deployment.resume and has_journal(run, runs)
    name = (declared_name(path) if resumes else None) or inputs.task.name
    if not resumes:
        with interrupt_then_exit(), note_if_slow(FIRST_STEP) if run.private else nullcontext():
            devices = devices_of(identity.roster()).values()
            inputs.check(runs / run.name, [one.name for one in devices])
    elif run.federation.initial is not None:
        check_outside(run.path(run.federation.initial), runs / run.name)
    address = deployment.address(identity)
    address.check_free()
    check_socket(identity)
    identity.roster()  # rejects a file that is not this project's member list
    opening = open_run(
        run, runs, resume=deployment.resume, fresh=deployment.fresh, on_point=on_point
    )
    with (
        opening as (folder, journal),
        json_lines(folder / "metrics.jsonl") as lines,
        mlflow_run(run, "server", folder) as tracker,
        choose(out, json=deployment.json) as shown,
    ):
        if journal.start is None:
            _ = inputs.task  # nothing was committed before the crash, so this is a new run
        kept = tee(lines, control.sink)
        emit = tee(kept, tracker, shown)
        for record in journal.start.records if journal.start else ():
            kept(RoundFinished(asdict(record)))
        for note in _notes_of_resume(journal):
            emit(Noted(note))
        if journal.start is None and (warning := inputs.task.check_model()):
            emit(Noted(warning))
        yield LiveRun(
            run=run,
            inputs=inputs,
            identity=identity,
            address=address,
            delivery=deployment.delivery,
            hello=hello_of(name, path),
            settings=device_settings(run, instance=journal.instance),
            folder=folder,
            journal=journal,
            control=control,
            emit=emit,
            randomness=randomness,
        )


async def _serve(live: LiveRun) -> Outcome | None:
    """Serves devices and runs the remaining rounds; returns None if the rounds were stopped."""
    operate = operator_handler(live.control)
    settings, spool = live.settings, live.spool
    async with (
        listen(
            live.identity, live.hello, live.address, settings=settings, spool=spool, operate=operate
        ) as listening,
        serve_operators(live.control, live.identity, listening),
        _releases(live),
    ):
        members = Members(live.identity.roster(), listening.fleet)
        outcome = await run_beside(partial(_rounds, live, members, listening.peers), listening)
    # Rounds that ended as the signal came are kept; what follows them is left to a resume.
    ends = listening.interrupted and live.run.release.repository is not None
    return None if ends else outcome


@asynccontextmanager
async def _releases(live: LiveRun) -> AsyncIterator[None]:
    """Delivers what the run's repository holds, if the operator named a port for that."""
    if live.delivery is None or live.run.release.repository is None:
        yield
        return
    repository = live.run.path(live.run.release.repository)
    async with serve_releases(live.identity, repository, live.delivery, on_report=None):
        yield


def _rounds(live: LiveRun, members: Members, peers: Peers, grid: Grid) -> Outcome:
    _ = live.inputs.task  # first, as it prints that it loads; the next line imports torch
    from server.live.federate import federate

    return federate(live, members, peers, grid)


def _finish(live: LiveRun, outcome: Outcome | None) -> bool:
    """Fine-tunes, compresses and publishes the model; returns False if an operator stopped the run.

    ``outcome`` is None if the rounds ended in an earlier process.
    """
    if live.control.stopped:  # an operator stopped the run during its last round
        return False
    with serve_operators_in_thread(live.control, live.identity):
        task = live.inputs.task
        from server.live.finish import finish
        from server.live.judge import JudgeOnDevices
        from server.rounds.app import outcome_of
        from server.rounds.evaluation.judging import clients_judge

        if outcome is None:
            assert live.journal.start is not None
            outcome = outcome_of(live.run, task, live.journal.start)
        judge = JudgeOnDevices(live) if clients_judge(live.run) else None
        finish(live.run, task, outcome, live.folder, live.emit, judge=judge)
    return True


def _notes_of_resume(journal: Journal) -> list[str]:
    """Messages for a resumed run: any repair of the journal, and the round it resumes after."""
    notes = [journal.repairs] if journal.repairs else []
    if journal.start is not None:
        notes.append(f"Resumed after round {journal.round}.")
    return notes
