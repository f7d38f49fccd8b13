"""The part of a client's data that a model is evaluated on."""

from __future__ import annotations

from fedcore.errors import DataError
from fedcore.task.definition import Examples, Part, size_of
from fedcore.training.client import Client, local_data
from fedcore.training.examples import task_examples


def part_of(client: Client, name: str, part: Part) -> Examples:
    """Returns the part of a client's data that a model is evaluated on.

    Raises:
        DataError: The data cannot be read, or the part is empty.
    """
    task, folder = client.task, client.folder
    if part == "heldout":
        examples = local_data(client, name)[1]
        if not size_of(examples):
            trains = client.run.federation.has_judges
            remedy = "ask clients that do" if trains else "raise federation.holdout"
            raise DataError(
                f"client {name!r} holds no data back. It was not evaluated; {remedy}, or evaluate "
                "on other data."
            )
        return examples
    load = task.client_data
    if part == "test":
        assert task.client_test is not None  # callers check the task
        load = task.client_test
    what = f"{'test data' if part == 'test' else 'data'} of client {name!r}"
    return task_examples(task, lambda: load(name, folder), what=what, folder=folder)
