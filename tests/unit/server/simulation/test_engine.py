from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcore.updates.messages import REFUSED
from server.simulation.engine import simulate

NAMES = ["anna", "ben", "carl"]


def counting_client() -> ClientApp:
    """Answers with its name and how often it was asked, which it keeps in its own state."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        before = context.state.config_records.get("count", ConfigRecord({"asked": 0}))
        asked = int(str(before["asked"])) + 1
        context.state["count"] = ConfigRecord({"asked": asked})
        told = ConfigRecord({"name": str(context.node_config["client"]), "asked": asked})
        return Message(RecordDict({"told": told}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        raise RuntimeError("no evaluation here")

    return app


def asking_server(*rounds: tuple[str, list[int]]) -> tuple[ServerApp, list[Message]]:
    """Sends a kind of message to the places of nodes, round after round; keeps what comes back."""
    app, replies = ServerApp(), list[Message]()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        for kind, places in rounds:
            messages = [Message(RecordDict(), nodes[place], kind) for place in places]
            replies.extend(grid.send_and_receive(messages))

    return app, replies


def told(reply: Message) -> tuple[str, int]:
    record = reply.content.config_records["told"]
    return str(record["name"]), int(str(record["asked"]))


def test_each_node_is_the_client_of_its_place_and_keeps_its_own_state() -> None:
    server, replies = asking_server(("train", [0, 2]), ("train", [2]))
    simulation = simulate(server, counting_client(), NAMES)
    assert [told(reply) for reply in replies] == [("anna", 1), ("carl", 1), ("carl", 2)]
    assert simulation.rounds == {"anna": 1, "carl": 2}


def test_clients_that_are_never_asked_cost_nothing() -> None:
    server, _ = asking_server(("train", [1]))
    simulation = simulate(server, counting_client(), [f"client-{n}" for n in range(100_000)])
    assert list(simulation.contexts) == ["client-1"]


def test_only_training_counts_as_a_round() -> None:
    server, _ = asking_server(("train", [0]), ("evaluate", [0, 1]))
    simulation = simulate(server, counting_client(), NAMES)
    assert simulation.rounds["anna"] == 1
    assert simulation.rounds["ben"] == 0


def test_a_client_whose_app_fails_is_a_client_that_fails() -> None:
    server, replies = asking_server(("evaluate", [1]), ("train", [0]))
    simulate(server, counting_client(), NAMES)
    assert replies[0].error.code == REFUSED
    reason = str(replies[0].error.reason)
    assert reason.startswith("client 'ben': its app raised ")
    assert "no evaluation here" in reason
    assert told(replies[1]) == ("anna", 1)


def test_an_interrupt_is_no_failure_of_a_client() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    server, _ = asking_server(("train", [0]))
    with pytest.raises(KeyboardInterrupt):
        simulate(server, app, NAMES)


def test_an_error_of_the_server_ends_the_simulation() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        raise LookupError("no such round")

    with pytest.raises(LookupError, match="no such round"):
        simulate(app, counting_client(), NAMES)
