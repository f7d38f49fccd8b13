"""The rounds of a deployment: builds a Flower ServerApp over the devices and the journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

from flwr.app import MessageType
from flwr.serverapp import Grid

from fedcore.errors import FedcoreError, ResourceError
from fedcore.files import write_atomic
from fedcore.flower.identity import server_context
from fedcore.observability.events import Noted, RoundFinished
from fedcore.task.model import checkpoint_bytes
from fedcore.training.roles import is_judge
from server.finetune.in_rounds import tuner_of
from server.live.deployment import LiveRun
from server.live.evaluate import EvaluateOnDevices
from server.live.journal.journal import Journal
from server.live.network.members import Members
from server.live.rounds.journaled import REJOIN_S, JournalCheckpointer, JournalGrid
from server.records import RoundRecord
from server.report.folder import GLOBAL_MODEL
from server.rounds.app import Listener, Outcome, server_app
from server.rounds.peers import Peers


def federate(live: LiveRun, members: Members, peers: Peers, grid: Grid) -> Outcome:
    """Runs the remaining rounds, and writes the best model to ``global.safetensors``.

    Args:
        live: The opened run.
        members: The devices that rounds may select.
        peers: The devices' names and weights.
        grid: Sends messages to devices.

    Raises:
        FedcoreError: the rounds failed. The journal stays valid, and the run can be resumed.
    """
    run, journal = live.run, live.journal
    outcomes: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        path = live.folder / GLOBAL_MODEL
        write_atomic(path, checkpoint_bytes(outcome.model))
        journal.end()
        outcomes.append(outcome)
        kept = outcome.federated.best_round
        judged = any(each.metrics for each in outcome.federated.rounds)
        why = f"round {kept} is the best" if judged else f"round {kept}, the last, was kept"
        live.emit(Noted(f"{why}; its model is in {path}"))

    # After a restart, devices that were asked before need this long to reconnect.
    rejoin_s = REJOIN_S if journal.start else 0.0
    checkpointer = JournalCheckpointer(
        journal,
        report=lambda record: live.emit(finished(record)),
        deadline_s=run.federation.deadline_s,
        evaluated=run.federation.evaluate_cohort,
        rejoin_s=rejoin_s,
        judges=partial(_judges, live, members) if run.federation.has_judges else None,
        missing=partial(_missing, live, members, grid),
        on_wait=live.waiting,
        on_note=lambda text: live.emit(Noted(text)),
    )
    cloud = live.inputs.take_cloud()
    evaluate = EvaluateOnDevices(live, members, peers, grid)
    between = partial(live.control.evaluations.run_pending, evaluate)
    app = server_app(
        live.inputs.task,
        run,
        cloud=cloud,
        randomness=live.randomness,
        listener=Listener(
            on_note=lambda text: live.emit(Noted(text)),
            on_round=lambda record: None,  # reported once it is committed
            on_end=keep,
            on_wait=live.waiting,
        ),
        checkpointer=live.control.steered(checkpointer, between),
        start=journal.start,
        peers=peers,
        awaited=lambda: members.count(drained=live.control.drained),
        tuner=tuner_of(live.inputs.task, run, cloud, live.emit),
    )
    journaled = JournalGrid(
        grid,
        journal,
        admit=members.admit,
        quorum=run.federation.quorum / run.federation.over_selection,  # share of all nodes asked
        rejoin_s=rejoin_s,
        on_missing=live.control.allow_requests_while_waiting,
        on_wait=live.waiting,
        on_note=lambda text: live.emit(Noted(text)),
        name=peers.name,
    )
    with _cohorts_dropped_after_failure(journal):
        app(journaled, server_context(grid.run.run_id))
    return outcomes[0]


def _judges(live: LiveRun, members: Members) -> int:
    """Returns how many devices of the project only evaluate, drained ones left out."""
    among = partial(is_judge, live.run.federation)
    return members.count(drained=live.control.drained, among=among)


def _missing(live: LiveRun, members: Members, grid: Grid, kind: str) -> list[str]:
    """Returns the names of devices that messages of a kind are for, and that are not connected."""
    federation = live.run.federation
    names = members.missing(list(grid.get_node_ids()), drained=live.control.drained)
    if not federation.has_judges:
        return names
    judging = kind == MessageType.EVALUATE
    return [name for name in names if is_judge(federation, name) is judging]


@contextmanager
def _cohorts_dropped_after_failure(journal: Journal) -> Iterator[None]:
    """Drops selected cohorts if the rounds fail, unless a fault of this machine is the reason."""
    try:
        yield
    except ResourceError:
        raise  # once fixed, a resume continues with the same cohort
    except FedcoreError:
        journal.drop_cohorts()  # a resume selects among the devices that are connected then
        raise


def finished(record: RoundRecord) -> RoundFinished:
    """Returns the event for a completed round."""
    return RoundFinished(asdict(record))
