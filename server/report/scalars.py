"""Numbers of events by name and step, as trackers of experiments keep them."""

from __future__ import annotations

from collections.abc import Mapping

from fedcore.observability.events import (
    Event,
    RoundFinished,
    StageFinished,
    TrainingAdvanced,
    Value,
)

_TAGS = {
    "train_loss": "train/loss",
    "epsilon_max": "privacy/epsilon_max",
    "updates": "clients/updates",
    "declined": "clients/declined",
    "failed": "clients/failed",
    "bytes_up": "bytes/up",
    "bytes_down": "bytes/down",
    "seconds": "seconds/round",
    "clients_per_s": "pace/clients_per_s",
    "memory_bytes": "pace/memory_bytes",
}
_OF_TRAINING = ("loss", "learning_rate", "examples_per_s", "tokens_per_s", "memory_bytes")


def scalars_of(event: Event) -> tuple[int, dict[str, float]]:
    """Returns the step of an event, and its known numbers by name.

    A round's step is its number. A training's are its own, under names such as
    ``finetune/finetuned/loss``. The duration of a stage is at step 0. Other events have no numbers.
    """
    match event:
        case RoundFinished(values):
            return _of_round(values)
        case TrainingAdvanced():
            group = f"finetune/{event.model.replace(' ', '_')}"
            figures = {f"{group}/{name}": getattr(event, name) for name in _OF_TRAINING}
            return event.done, {tag: each for tag, each in figures.items() if each is not None}
        case StageFinished(stage, seconds):
            return 0, {f"seconds/{stage}": seconds}
        case _:
            return 0, {}


def _of_round(values: Mapping[str, Value]) -> tuple[int, dict[str, float]]:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    metrics = values.get("metrics")
    scalars = {tag: numbers[name] for name, tag in _TAGS.items() if name in numbers}
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        if value is not None:  # undefined in this round
            scalars[f"metrics/{name}"] = value
    for group in ("virtual", "client"):
        figures = values.get(group)
        for name, value in figures.items() if isinstance(figures, dict) else ():
            scalars[f"{group}/{name}"] = value
    return int(numbers["round"]), scalars
