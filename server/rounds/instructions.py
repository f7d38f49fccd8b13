"""Messages of a training round: the weights, and each client's configuration from the strategy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedcore.config.client_settings import read_settings
from fedcore.config.in_round import changed_in_round
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError, RoundFailed
from fedcore.flower.grid import CohortGrid
from fedcore.updates.frozen import FrozenState
from fedcore.updates.messages import FROZEN, instruction_config, weights_record
from fedcore.updates.pack import Layout
from server.rounds.checkpointing.progress import Progress
from server.rounds.federation import Federation
from server.rounds.inbound import FoldingGrid


def instructions(
    federation: Federation, progress: Progress, layout: Layout, nodes: Sequence[int]
) -> list[Message]:
    """Returns the strategy's messages to ``nodes`` for the round after ``progress``.

    Raises:
        RoundFailed: the strategy raised an error or returned invalid messages.
    """
    number, strategy = progress.round + 1, federation.chosen.strategy
    try:
        # A strategy that folds draws random numbers only to sample the cohort, which it gets whole.
        with nullcontext() if federation.folding else streams(federation, number, "configure"):
            messages = list(
                strategy.configure_train(
                    number,
                    weights_record(progress.weights),
                    _config(progress, layout),
                    CohortGrid(federation.grid, nodes),
                )
            )
    except FedcoreError:
        raise
    except Exception as error:  # a strategy may raise any error
        raise _failed(federation, number, f"{type(error).__name__}: {error}") from error
    if not messages or any(not isinstance(one, Message) for one in messages):
        raise _failed(federation, number, "configure_train returned no messages, or something else")
    if sorted(one.metadata.dst_node_id for one in messages) != sorted(nodes):
        raise _failed(
            federation, number, "configure_train must return one message for each node of the round"
        )
    if carries_frozen(federation.grid, progress.frozen):
        for message in messages:  # they share their contents
            message.content[FROZEN] = progress.frozen.record
    return messages


def carries_frozen(grid: Grid, frozen: FrozenState) -> bool:
    """Returns whether messages carry a model's frozen parameters.

    A device fetches them once, and knows them by their digests from then on. The workers of a
    simulation build them as the server does.
    """
    return bool(frozen.raw) and not isinstance(grid, FoldingGrid)


def instruction_in_place(
    federation: Federation, progress: Progress, layout: Layout, nodes: Sequence[int]
) -> tuple[Message, dict[int, ConfigRecord]]:
    """Returns one message with the content for all nodes, and the configurations that differ.

    Raises:
        RoundFailed: the strategy raised an error or returned invalid messages.
    """
    own, number = federation.chosen.own, progress.round + 1
    if own is None:  # one of Flower's: it sends every node the same content
        return instructions(federation, progress, layout, nodes[:1])[0], {}
    content, configs = own.content_of_round(
        number, weights_record(progress.weights), _config(progress, layout), nodes
    )
    return Message(content, nodes[0], MessageType.TRAIN), dict(configs)


def settings_in_round(
    run: RunConfig, number: int, configs: Iterable[ConfigRecord]
) -> dict[str, float]:
    """Returns the settings of local training that are this round's own, by name.

    Args:
        run: The run, whose schedules hold.
        number: The round.
        configs: Configurations that were sent. A setting in them takes precedence, and is returned
            if all have the same.
    """
    different = {id(one): one for one in configs}.values()
    asked = [read_settings(one).changes for one in different]
    common = asked[0] if asked and all(one == asked[0] for one in asked) else {}
    found = changed_in_round(run, number)
    for names in (common,) if common else asked:
        for name in names:  # where clients differ, no value is everyone's
            found.pop({"max_grad_norm": "clip_norm"}.get(name, name), None)
    numbers = {k: v for k, v in common.items() if type(v) in (int, float)}
    return found | numbers


def _config(progress: Progress, layout: Layout) -> ConfigRecord:
    protection = progress.protection
    clip_norm = protection.clip_norm if protection else 0.0
    digest = progress.frozen.sha256
    return instruction_config(
        layout, progress.preprocess, clip_norm=clip_norm, frozen_sha256=digest
    )


def _failed(federation: Federation, number: int, reason: str) -> RoundFailed:
    return RoundFailed(
        f"round {number}: {federation.chosen.name} failed to configure it: {reason}. No client "
        f"was asked to train; the global model is that of round {number - 1}."
    )


def streams(federation: Federation, number: int, step: str) -> AbstractContextManager[None]:
    """Seeds the random streams that Flower's strategies draw from, in a simulation."""
    if federation.randomness.origin == "simulated":
        return federation.randomness.library_streams("strategy", step, number)
    return nullcontext()
