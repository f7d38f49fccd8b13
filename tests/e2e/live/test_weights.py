"""Updates of one round weigh by one rule, whoever is enrolled while it is on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import pytest
from flwr.app import Message

from fedcore.crypto.roster import Roster
from fedcore.flower.fleet_grid import GRACE_S, ServerStopped
from fedcore.seeds import Simulated
from fedcore.task.definition import load_task
from server.live.journal.journal import Journal, create, reopen
from server.live.network.members import Members
from server.live.rounds.journaled import JournalCheckpointer, JournalGrid
from server.rounds.app import Listener, server_app
from tests.e2e.live.test_live_rounds import wait_for

NAMES = ("edge-0", "edge-1")
_WAITS = """    if client == "edge-1":
        import time
        from pathlib import Path
        while not Path({path!r}).exists():
            time.sleep(0.1)
    return TensorDataset"""


class Noting(JournalGrid):
    """Notes what each update of a round weighs."""

    noted: dict[int, int]

    def send_and_receive_batches(
        self, messages: Sequence[Message], *, timeout: float | None
    ) -> Iterator[Sequence[Message]]:
        for batch in super().send_and_receive_batches(messages, timeout=timeout):
            for reply in batch:
                node, kind = reply.metadata.src_node_id, reply.metadata.message_type
                if kind == "train":
                    asked = self._journal.selected_cohort(kind)
                    assert asked is not None
                    assert asked.weights is not None
                    self.noted[node] = asked.weights[node]
            yield batch


def federating(project: Any, served: Any, run: Any, journal: Journal) -> Any:
    """Rounds over the journal, in a thread; and what updates weighed."""
    roster = Roster(project.root / "server" / "roster.json", project.server().kit.authority_pem)
    members = Members(roster, served.listening.fleet)
    checkpointer = JournalCheckpointer(journal, report=lambda record: None, deadline_s=60.0)
    app = server_app(
        load_task(project.task),
        run,
        cloud=None,
        randomness=Simulated(run.seed),
        listener=Listener(lambda note: None, lambda record: None, lambda outcome: None),
        checkpointer=checkpointer,
        start=journal.start,
        peers=served.listening.peers,
    )
    grid = Noting(served.listening.grid(), journal, admit=members.admit, quorum=1.0)
    grid.noted = {}

    def body() -> None:
        with suppress(ServerStopped):
            app(grid, None)  # type: ignore[arg-type]

    thread = threading.Thread(target=body)
    thread.start()
    return thread, grid.noted


@pytest.mark.slow
@pytest.mark.parametrize("restarted", [False, True])
def test_who_is_enrolled_during_a_round_does_not_change_its_weights(
    project: Any, serve: Any, launch_device: Any, restarted: bool
) -> None:
    go = project.root / "go"
    text = project.task.read_text()
    project.task.write_text(text.replace("    return TensorDataset", _WAITS.format(path=str(go))))
    for name in NAMES:
        project.device(name)
        entry = project.members[name]
        project.members[name] = entry.model_copy(update={"num_examples": 1000})
    project.write_roster()
    run = project.run(rounds=1, cohort=2, quorum=1.0, deadline_s=60.0)
    folder = project.root / "journal"
    folder.mkdir()
    devices = {name: launch_device(name) for name in NAMES}

    def killed() -> None:
        """A device that committed to nothing is enrolled, and one that trains is killed."""
        project.device("edge-9")
        devices["edge-1"].send(signal.SIGKILL)
        devices["edge-1"].end()

    with closing(create(folder, {})) as journal, serve(run) as served:
        thread, noted = federating(project, served, run, journal)
        wait_for(lambda: len(noted) == 1, 60)
        devices["edge-1"].wait_for("stream open")
        killed()
        if not restarted:
            time.sleep(GRACE_S + 2.0)  # it is gone, and will be sent the message again
            go.touch()
            launch_device("edge-1")
        else:
            served.listening.stop()
        thread.join(60)
        assert not thread.is_alive()
    if restarted:
        again = reopen(folder)
        assert again is not None
        with closing(again) as journal, serve(run) as served:
            go.touch()
            launch_device("edge-1")
            thread, noted = federating(project, served, run, journal)
            thread.join(60)
            assert not thread.is_alive()
    assert sorted(noted.values()) == [1000, 1000]
