"""The rounds of a run over devices: a ServerApp over the fleet, with a journal of every step."""

from __future__ import annotations

from dataclasses import asdict

from flwr.serverapp import Grid

from fedcore.errors import FedcoreError, ResourceError
from fedcore.files import write_atomic
from fedcore.flower.identity import server_context
from fedcore.observability.events import Noted, RoundFinished
from fedcore.task.model import checkpoint_bytes
from server.live.deployment import LiveRun
from server.live.network.members import Members
from server.live.rounds.journaled import REJOIN_S, JournalCheckpointer, JournalGrid
from server.records import RoundRecord
from server.rounds.app import Listener, Outcome, server_app
from server.rounds.checkpointing import Peers


def federate(live: LiveRun, members: Members, peers: Peers, grid: Grid) -> Outcome:
    """Runs the rounds that are left; the best model goes to the run's folder.

    Args:
        live: The run.
        members: Whom rounds may reach.
        peers: Who they are.
        grid: Reaches them.

    Raises:
        FedcoreError: whatever stops the rounds. What the journal holds stands.
    """
    run, journal = live.run, live.journal
    outcomes: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        path = live.folder / "global.safetensors"
        write_atomic(path, checkpoint_bytes(outcome.model))
        journal.end()
        outcomes.append(outcome)
        live.emit(
            Noted(f"round {outcome.federated.best_round} is the best; its model is in {path}")
        )

    # Devices that were asked before a restart may take so long to find this server again.
    rejoin_s = REJOIN_S if journal.start else 0.0
    checkpointer = JournalCheckpointer(
        journal,
        report=lambda record: live.emit(finished(record)),
        deadline_s=run.federation.deadline_s,
        weights=members.weights,
        evaluated=run.federation.evaluate_cohort,
        rejoin_s=rejoin_s,
        waits=live.waiting,
    )
    app = server_app(
        live.inputs.task,
        run,
        cloud=live.inputs.take_cloud(),
        randomness=live.randomness,
        listener=Listener(
            on_note=lambda text: live.emit(Noted(text)),
            on_round=lambda record: None,  # reported once it is committed
            on_end=keep,
            on_wait=live.waiting,
        ),
        checkpointer=live.control.steered(checkpointer),
        start=journal.start,
        peers=peers,
        awaited=lambda: members.count(drained=live.control.drained),
    )
    journaled = JournalGrid(
        grid,
        journal,
        admit=members.admit,
        quorum=run.federation.quorum / run.federation.over_selection,  # of all who are asked
        rejoin_s=rejoin_s,
        lacks=live.control.lacks_devices,
        waits=live.waiting,
        name=peers.name,
    )
    try:
        app(journaled, server_context(grid.run.run_id))
    except ResourceError:
        raise  # this machine's: the round goes on as it was once that is mended
    except FedcoreError:
        journal.drop()  # a resume asks the devices that are there then
        raise
    return outcomes[0]


def finished(record: RoundRecord) -> RoundFinished:
    """The event of a round that is over."""
    return RoundFinished(asdict(record))
