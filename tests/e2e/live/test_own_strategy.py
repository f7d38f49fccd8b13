"""A strategy of the user's own over three devices, which learn nothing of its file."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedcore.config.owner import OPEN_POLICY
from fedcore.seeds import Simulated
from fedcore.task.definition import load_task
from server.rounds.app import Listener, Outcome, server_app
from server.simulation.federate import federate as simulate
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import SimulationState

NAMES = ["edge-0", "edge-1", "edge-2"]
MINE = """
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
