"""A strategy of the user's own over three devices, which learn nothing of its file; and killed."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from typing import Any

import numpy as np

from fedcore import cli
from fedcore.config.owner import OPEN_POLICY
from fedcore.errors import SignatureInvalid
from fedcore.seeds import Simulated
from fedcore.task.definition import load_task
from server.live.journal.entries import Entries
from server.live.journal.head import JOURNAL
from server.rounds.app import Listener, Outcome, server_app
from server.simulation.federate import federate as simulate
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import SimulationState

NAMES = ["edge-0", "edge-1", "edge-2"]
MINE = """
import os
import signal
from pathlib import Path

import numpy as np
from fedcore import Algorithm, ClientSettings


class Mine(Algorithm):
    folds = True

    def initial(self, weights):
        return {"velocity": np.zeros_like(weights)}

    def configure(self, round, clients, state):
        settings = {name: ClientSettings(learning_rate=0.3 / round.number) for name in clients}
        return settings | {"edge-1": ClientSettings(epochs=3, proximal_mu=0.1)}

    def step(self, round, weights, mean, state):
        velocity = 0.5 * state["velocity"] + (weights - mean)
        return weights - velocity, {"velocity": velocity}


class Mortal(Mine):
    # Has its server killed in the third round: all updates are in, and nothing is committed.

    def step(self, round, weights, mean, state):
        begun = Path("runs/trial/journal").exists()  # a strategy is tried out before that
        if round.number == 3 and begun and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(round, weights, mean, state)
"""


def test_devices_give_what_a_simulation_gives(project: Any, serve: Any, start: Any) -> None:
    (project.root / "mine.py").write_text(MINE)
    run = project.run(strategy="mine.py:Mine", rounds=3, max_update_norm="none")
    task, outcomes = load_task(project.task), list[Outcome]()
    listener = Listener(lambda note: None, lambda record: None, outcomes.append)
    with serve(run) as served:
        for name in NAMES:
            start(name)
        app = server_app(
            task,
            run.model_copy(update={"federation": run.federation.model_copy(update={"cohort": 3})}),
            cloud=None,
            randomness=Simulated(run.seed),
            listener=listener,
            peers=served.listening.peers,
        )
        app(served.listening.grid(), None)  # type: ignore[arg-type]
    names = NAMES
    virtual = server_app(
        task,
        run,
        cloud=None,
        randomness=Simulated(run.seed),
        listener=listener,
        client_name=lambda node: names[node - FIRST_NODE_ID],
    )
    simulate(
        virtual,
        task,
        run.model_copy(
            update={"simulation": run.simulation.model_copy(update={"training": "loop"})}
        ),
        OPEN_POLICY,
        names,
        state=SimulationState(),
        fleet=None,
        on_choice=lambda choice, workers: None,
    )
    live, simulated = (outcome.federated for outcome in outcomes)
    assert [record.updates for record in live.rounds] == [3, 3, 3]
    assert np.abs(live.weights - simulated.weights).max() <= 1e-6


ROUNDS = 4
OVERRIDES = ("federation.strategy=mine.py:Mortal", f"federation.rounds={ROUNDS}")


def test_a_killed_server_goes_on_with_its_strategy_as_if_it_had_not_been(
    project: Any, start: Any, launch: Any, launch_server: Any, capsys: Any
) -> None:
    """Per-round settings and the strategy's own state are those of the uninterrupted run."""
    (project.root / "mine.py").write_text(MINE)
    for name in NAMES:
        project.device(name)
    whole = launch_server(*OVERRIDES, name="whole")
    for name in NAMES:
        start(name)
    assert whole.end(60) == 0, whole.log.read_text()

    (project.root / "kill").touch()
    killed = launch_server(*OVERRIDES)
    assert killed.end(60) == -signal.SIGKILL, killed.log.read_text()
    assert killed.log.read_text().count('"round_finished"') == 2
    again = launch(*killed.words, "--resume")  # the same command once more
    assert again.end(60) == 0, again.log.read_text()
    assert "Resumed after round 2." in again.log.read_text()

    models = [project.root / "runs" / name / "global.safetensors" for name in ("whole", "trial")]
    assert models[0].read_bytes() == models[1].read_bytes()
    results = project.root / "runs" / "trial"
    verify = ["server", "verify", str(results), "--identity", str(project.root / "server")]
    assert cli.main([*verify, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clients"] == dict.fromkeys(NAMES, ROUNDS)
    assert (told["rounds"], told["updates"], told["faults"]) == (ROUNDS, 3 * ROUNDS, [])
    with closing(Entries(results / "journal" / JOURNAL)) as entries:
        (*_, last) = entries.of("signature/train")
        entries.remove([(last.kind, last.round, last.node)])
    assert cli.main(verify) == SignatureInvalid.exit_code
    shown = capsys.readouterr()
    named = f"round {ROUNDS}, train: 3 updates and 2 signatures"
    assert f"Missing:    {named}" in shown.out
    assert named in shown.err
