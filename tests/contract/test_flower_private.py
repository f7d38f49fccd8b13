"""What fedcore relies on in Flower, private and public, held to the versions it is built for.

A failure here says what moved in Flower and which file of fedcore stands on it.
"""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from fedcore.flower.grid import CohortGrid, InProcessGrid
from fedcore.flower.identity import SERVER_NODE_ID, assume_identity
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    DECLINED,
    METRICS,
    NUM_EXAMPLES,
    REFUSED,
    STATISTICS,
)
from server.rounds.strategies import flower as strategies

ROOT = Path(__file__).parents[2]
NODE = SERVER_NODE_ID + 1
PRIVATE = {
    "flwr.common.constant.SUPERLINK_NODE_ID",
    "flwr.common.logger.FLOWER_LOGGER",
    "flwr.supercore.inflatable.inflatable_object.get_all_nested_objects",
    "flwr.supercore.run.Run",
    "flwr.supercore.task_identity.TaskIdentity",
}
"""Every private name that fedcore imports; each has a test below."""
GIVEN = {
    *("fraction_train", "fraction_evaluate"),
    *("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"),
    *("weighted_by_key", "arrayrecord_key", "configrecord_key"),
}
"""What `server.rounds.strategies.flower.make_strategy` gives to what is no DP wrapper."""


@pytest.fixture(autouse=True)
def identity() -> None:
    assume_identity(1)


def instruction(message_type: str = MessageType.TRAIN) -> Message:
    content = RecordDict({CONFIG: ConfigRecord({"layout": "abc", "preprocess": b"\0"})})
    return Message(content, NODE, message_type, group_id="7")


def parameters(callable_: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(callable_).parameters)


# --- private modules: fedcore/flower ---------------------------------------------------------


def imported() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "fedcore" / "flower").glob("*.py")):
        if path.name.startswith("fleet") or path.name == "records.py":
            continue  # test_flower_fleet.py looks at those
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flwr"):
                yield from ((node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("flwr")]
                yield from ((name, "") for name in names)


def test_every_private_name_that_is_imported_has_a_test_here() -> None:
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
    private = {f"{module}.{name}" for module, name in imported() if not module.startswith(public)}
    assert private == PRIVATE, (
        "fedcore/flower imports other private names of Flower than are tested here: "
        f"{sorted(private ^ PRIVATE)}"
    )


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_the_private_name_is_still_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute), f"Flower moved {name} out of {module}"


def test_a_run_can_be_made_from_its_id_alone() -> None:
    from flwr.supercore.run import Run

    assert Run.create_empty(42).run_id == 42, "fedcore/flower/grid.py makes its run so"


def test_the_server_has_a_node_id_that_leaves_room_above() -> None:
    assert isinstance(SERVER_NODE_ID, int), (
        "server/simulation/virtual/nodes.py numbers nodes from it"
    )
    assert 0 < SERVER_NODE_ID < 2**63 - 1


def test_flowers_logger_is_the_one_that_its_parts_write_to() -> None:
    from flwr.common.logger import FLOWER_LOGGER
    from flwr.supercore import log

    assert isinstance(FLOWER_LOGGER, logging.Logger)
    assert FLOWER_LOGGER.name == "flwr", "fedcore/flower/quiet.py silences this logger"
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    FLOWER_LOGGER.addHandler(handler)
    try:
        log(logging.CRITICAL, "a word")
    finally:
        FLOWER_LOGGER.removeHandler(handler)
    assert heard == ["a word"], "Flower's parts no longer log through FLOWER_LOGGER"


def test_a_message_takes_its_sender_from_the_process_identity() -> None:
    assume_identity(9)
    metadata = instruction().metadata
    where = "fedcore/flower/identity.py sets what Message reads"
    assert (metadata.run_id, metadata.src_node_id) == (9, SERVER_NODE_ID), where
    assert metadata.src_task_id == TaskIdentity.task_id, where


# --- messages: fedcore/client_app.py, server/rounds/loop.py ---------------------------------------


def test_a_message_carries_what_it_was_made_with() -> None:
    message = Message(RecordDict(), NODE, STATISTICS, ttl=5.0, group_id="g")
    metadata = message.metadata
    assert (metadata.dst_node_id, metadata.message_type) == (NODE, STATISTICS)
    assert (metadata.ttl, metadata.group_id) == (5.0, "g")


def test_a_reply_goes_back_to_where_the_message_came_from() -> None:
    asked = instruction()
    for reply in (Message(RecordDict(), reply_to=asked), Message(Error(1), reply_to=asked)):
        metadata = reply.metadata
        assert metadata.src_node_id == NODE, "rounds sort updates by src_node_id"
        assert metadata.dst_node_id == SERVER_NODE_ID
        assert metadata.message_type == MessageType.TRAIN
        assert metadata.reply_to_message_id == asked.metadata.message_id
        assert (metadata.run_id, metadata.group_id) == (1, "7")


def test_a_reply_needs_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's simulation gives its workers none, and every client answers there."""
    asked = instruction()
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="not set"):
        instruction()
    reply = Message(RecordDict(), reply_to=asked)
    assert reply.metadata.src_node_id == NODE


def test_the_content_of_a_reply_can_be_exchanged() -> None:
    reply = Message(RecordDict(), reply_to=instruction())
    content = RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: 3})})
    reply.content = content
    assert reply.content is content, "server/rounds/loop.py folds a round into one reply so"
    assert not reply.has_error()


def test_an_error_keeps_its_code_and_reason() -> None:
    reply = Message(Error(DECLINED, "spent"), reply_to=instruction())
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (DECLINED, "spent")


def test_our_error_codes_are_none_of_flowers() -> None:
    theirs = {value for value in vars(ErrorCode).values() if isinstance(value, int)}
    assert len(theirs) >= 9, "flwr.common.constant.ErrorCode no longer lists its codes as numbers"
    clash = theirs & {DECLINED, REFUSED}
    assert not clash, f"Flower now uses {clash}: choose others in fedcore/updates/messages.py"


def test_the_types_of_messages_are_the_words_that_fedcore_knows() -> None:
    words = (MessageType.TRAIN, MessageType.EVALUATE, MessageType.QUERY)
    assert words == ("train", "evaluate", "query")
    assert f"{MessageType.QUERY}.statistics" == STATISTICS


def test_records_keep_what_fedcore_puts_into_them() -> None:
    weights = np.arange(5, dtype=np.float32)
    array = ArrayRecord({"model": Array(weights)})["model"]
    where = "fedcore/updates/messages.py checks an update by these before it reads it"
    assert (array.dtype, tuple(array.shape)) == ("float32", (5,)), where
    assert isinstance(array.data, bytes), where
    np.testing.assert_array_equal(array.numpy(), weights)
    assert array.numpy().dtype == np.float32

    record = RecordDict({ARRAYS: ArrayRecord(), CONFIG: ConfigRecord({"b": b"\0\1", "s": "x"})})
    assert record.config_records[CONFIG]["b"] == b"\0\1"
    assert record.config_records.get("none") is None
    assert list(record.array_records) == [ARRAYS]
    metrics = MetricRecord({NUM_EXAMPLES: 3, "loss": 0.5})
    assert isinstance(metrics[NUM_EXAMPLES], int)
    assert isinstance(metrics["loss"], float)


# --- apps and their contexts: fedcore/client_app.py, server/rounds/app.py -------------------------


def context() -> Context:
    config: dict[str, Any] = {"partition-id": 3}
    return Context(run_id=1, node_id=NODE, node_config=config, state=RecordDict(), run_config={})


def test_a_client_app_calls_the_function_of_the_message_type() -> None:
    app, called = ClientApp(), list[str]()

    def function(name: str) -> Callable[[Message, Context], Message]:
        def answer(message: Message, _: Context) -> Message:
            called.append(name)
            return Message(RecordDict(), reply_to=message)

        return answer

    app.train(mods=[])(function("train"))
    app.evaluate()(function("evaluate"))
    app.query("statistics")(function("statistics"))
    for message_type in (MessageType.TRAIN, MessageType.EVALUATE, STATISTICS):
        app(instruction(message_type), context())
    assert called == ["train", "evaluate", "statistics"]


def test_a_decorator_of_a_client_app_returns_the_function() -> None:
    app = ClientApp()

    @app.train()
    @app.evaluate()
    def answer(message: Message, _: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    for message_type in (MessageType.TRAIN, MessageType.EVALUATE):
        assert app(instruction(message_type), context()).metadata.message_type == message_type


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod])
def test_a_mod_stands_around_the_function(mod: Callable[..., Message]) -> None:
    assert len(parameters(mod)) == 3, (
        f"{mod} takes {parameters(mod)}: see server/rounds/strategies/flower.py"
    )


def test_what_a_client_writes_into_its_state_stays_there() -> None:
    node = context()
    node.state["fedcore.ledger"] = ConfigRecord({"charges": "[]"})
    assert node.state.config_records["fedcore.ledger"]["charges"] == "[]"


def test_flowers_simulation_names_a_node_by_its_partition() -> None:
    constants = import_module("flwr.common.constant")
    assert constants.PARTITION_ID_KEY == "partition-id", "fedcore.client_app.client_name reads it"


def test_a_server_app_hands_grid_and_context_to_its_main() -> None:
    app, got = ServerApp(), list[object]()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        got.extend((grid, context))

    grid, here = InProcessGrid(1, [], lambda message: message), context()
    app(grid, here)
    assert got == [grid, here]


# --- grids: fedcore/flower/grid.py -----------------------------------------------------------


def test_a_grid_has_the_methods_that_ours_have() -> None:
    wanted = {
        "create_message": ["self", "content", "message_type", "dst_node_id", "group_id", "ttl"],
        "get_node_ids": ["self"],
        "pull_messages": ["self", "message_ids"],
        "push_messages": ["self", "messages"],
        "send_and_receive": ["self", "messages", "timeout"],
        "set_run": ["self", "run"],
    }
    found = set(Grid.__abstractmethods__)
    assert found == {*wanted, "run"}, f"Flower's Grid changed by {found ^ {*wanted, 'run'}}"
    for cls in (Grid, InProcessGrid, CohortGrid):
        methods = {name: parameters(getattr(cls, name)) for name in wanted}
        assert methods == wanted, f"{cls.__name__} differs from what Flower's Grid asks for"


# --- strategies: server/rounds/strategies/flower.py ---------------------------------------------


def plain_strategies() -> list[type[Strategy]]:
    """Those that aggregate weights themselves."""
    every = [getattr(flower, name) for name in strategies.strategy_names()]
    return [cls for cls in every if "strategy" not in parameters(cls) and "Xgb" not in cls.__name__]


def test_the_strategies_are_the_ones_that_were_looked_at() -> None:
    assert strategies.strategy_names() == sorted(
        [
            *("Bulyan", "FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedMedian", "FedProx"),
            *("FedTrimmedAvg", "FedXgbBagging", "FedXgbCyclic", "FedYogi", "Krum", "MultiKrum"),
            *("QFedAvg", "DifferentialPrivacyClientSideAdaptiveClipping"),
            "DifferentialPrivacyClientSideFixedClipping",
            "DifferentialPrivacyServerSideAdaptiveClipping",
            "DifferentialPrivacyServerSideFixedClipping",
        ]
    ), "server/rounds/strategies/flower.py decides whether a new strategy folds, and what it gets"


@pytest.mark.parametrize("cls", plain_strategies())
def test_a_strategy_takes_what_fedcore_gives_it(cls: type[Strategy]) -> None:
    missing = GIVEN - set(parameters(cls))
    assert not missing, f"{cls.__name__} no longer takes {missing}, and would run with defaults"


@pytest.mark.parametrize("name", [n for n in strategies.strategy_names() if n.startswith("Diff")])
def test_a_wrapper_takes_what_fedcore_gives_it(name: str) -> None:
    missing = {"strategy", "num_sampled_clients"} - set(parameters(getattr(flower, name)))
    assert not missing, f"{name} no longer takes {missing}"


def test_no_parameter_that_fedcore_sets_itself_is_gone() -> None:
    taken = {name for n in strategies.strategy_names() for name in parameters(getattr(flower, n))}
    gone = strategies._RESERVED_OPTIONS - taken
    assert not gone, (
        f"server/rounds/strategies/flower.py reserves {gone}; Flower has no such parameter"
    )


def test_a_strategy_shown_only_its_cohort_asks_all_of_it() -> None:
    nodes = [NODE + 4, NODE + 1, NODE + 9]
    behind = InProcessGrid(1, range(NODE, NODE + 20), lambda message: message)
    strategy = strategies.make_strategy("FedProx", {"proximal_mu": 0.25}, cohort=3, size=0).strategy
    arrays, config = ArrayRecord({"model": Array(np.zeros(2, np.float32))}), ConfigRecord()
    messages = list(strategy.configure_train(6, arrays, config, CohortGrid(behind, nodes)))
    assert sorted(m.metadata.dst_node_id for m in messages) == sorted(nodes)
    for message in messages:
        assert message.metadata.message_type == MessageType.TRAIN
        sent = message.content.config_records[CONFIG]
        where = "fedcore.updates.messages.read_instruction reads it"
        assert sent["server-round"] == 6, where
        assert sent["proximal-mu"] == 0.25, where
        assert list(message.content.array_records) == [ARRAYS]


def test_aggregation_gives_weights_under_the_name_that_they_came_with() -> None:
    strategy = strategies.make_strategy("FedAvg", {}, cohort=2, size=0).strategy
    replies = []
    for value, count in ((1.0, 1), (4.0, 2)):
        arrays = ArrayRecord({"model": Array(np.full(2, value, np.float32))})
        metrics = MetricRecord({NUM_EXAMPLES: count})
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        replies.append(Message(content, reply_to=instruction()))
    mean, _ = strategy.aggregate_train(1, replies)
    assert mean is not None
    np.testing.assert_allclose(mean["model"].numpy(), [3.0, 3.0])


def test_the_objects_of_a_record_are_found_by_the_digest_of_their_bytes() -> None:
    """Devices keep frozen parameters as the objects that they came in."""
    record = ArrayRecord({"frozen": Array(np.arange(5, dtype=np.uint8))})
    found = get_all_nested_objects(record)
    assert record.object_id in found
    assert len(found) > 1
    for object_id, one in found.items():
        assert sha256(one.deflate()).hexdigest() == object_id
