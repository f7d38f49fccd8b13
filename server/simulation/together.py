"""Answers a round's training messages by training its clients side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from flwr.app import Message

from fedcore.client_app import Client, local_data, model_of, refusal
from fedcore.errors import ConfigError, TrainingDiverged
from fedcore.model import build_model
from fedcore.task import size_of
from fedcore.training.device import available
from fedcore.training.local import check_loss
from fedcore.training.memory import memory_errors
from fedcore.updates.messages import TRAIN_LOSS, Update, read_instruction, update_content
from server.simulation.engine import Together
from server.simulation.vectorised import LocalWork, check_vectorisable, train_cohort
from server.strategies import client_mods


def vectorised_clients(client: Client) -> Together:
    """What trains a cohort at once, as each client of ``client.task`` would alone.

    Raises:
        ConfigError: the model, or a mod that the strategy has clients run, does not allow it.
    """
    run = client.run
    check_vectorisable(build_model(client.task, run))
    if client_mods(run.federation.strategy):
        raise ConfigError(
            f"simulation.engine = 'vectorised': clients of {run.federation.strategy} run a mod "
            "around their training, each its own. Nothing was trained; use engine = 'loop'."
        )

    def answer(names: Sequence[str], messages: Sequence[Message]) -> Iterator[Message]:
        work: list[LocalWork] = []
        ready: list[tuple[str, Message]] = []
        instruction = read_instruction(messages[0])  # a round sends the same to everyone
        number = instruction.round
        for name, message in zip(names, messages, strict=True):
            try:
                examples, _ = local_data(client, name)
            except (
                Exception,
                SystemExit,
            ) as error:  # the task's code: its failure is that client's
                yield refusal(name, error, message)
                continue
            order = client.randomness.generator(torch.device("cpu"), "order", number, name)
            work.append(LocalWork(examples, order))
            ready.append((name, message))
        device = available(run.client.device)
        with memory_errors(f"round {number}: training {len(work)} clients together"):
            trained = train_cohort(
                model_of(client, instruction).to(device),
                work,
                client.task.loss_of,
                run.client,
                proximal_mu=instruction.proximal_mu,
            )
        for (name, message), one, result in zip(ready, work, trained, strict=True):
            try:
                check_loss(
                    result.loss,
                    epoch=run.client.epochs - 1,
                    learning_rate=run.client.learning_rate,
                )
            except TrainingDiverged as error:
                yield refusal(name, error, message)
                continue
            weights = result.weights.cpu().numpy()
            metrics = {TRAIN_LOSS: result.loss}
            update = Update(weights, size_of(one.examples), metrics)
            yield Message(update_content(update), reply_to=message)

    return answer
