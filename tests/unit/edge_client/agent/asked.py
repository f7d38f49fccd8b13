"""A device's loop without a server: runs, kits and instructions, and what is answered to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Message, RecordDict

from fedcore.config.run import RunConfig
from fedcore.crypto.keys import new_key, public_bytes, save_key
from fedcore.task.definition import Task
from fedcore.task.model import build_model, preprocess_bytes
from fedcore.updates.frozen import frozen_state
from fedcore.updates.messages import ARRAYS, CONFIG, instruction_config, weights_record
from fedcore.updates.pack import layout_of, pack
from server.live.rounds.settings import device_settings

RUN_ID = 7
PRIVATE = {
    "unit": "example",
    "target_delta": 1e-3,
    "noise_multiplier": 1.0,
    "max_epsilon": 1e6,
    "accountant": "rdp",
}


def run_of(name: str = "run", *, privacy: dict[str, Any], **federation: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": name,
            "task": "task.py",
            "federation": {"rounds": 9} | federation,
            "client": {"batch_size": 8, "device": "cpu"},
            "privacy": privacy,
        }
    )


def kit_in(root: Path) -> Any:
    """The kit of the client ``anna``, without certificates."""
    folder = root / "kit"
    folder.mkdir()
    key = new_key()
    save_key(folder / "key.pem", key)
    return SimpleNamespace(
        name="anna", folder=folder, key_path=folder / "key.pem", public=public_bytes(key)
    )


@dataclass
class Link:
    """In place of a server."""

    run: RunConfig
    node_id: int = 3
    answers: list[Message] = field(default_factory=list)

    def settings(self, run_id: int) -> dict[str, str]:
        return device_settings(self.run, instance="first")

    def fetch(self, found: Any, *, limit_bytes: int, kept: Any) -> Message:
        message: Message = found.message
        return message

    def answer(self, reply: Message) -> None:
        self.answers.append(reply)


def instruction(task: Task, run: RunConfig, number: int, **more: Any) -> Message:
    model = build_model(task, run)
    digest = frozen_state(model.model).sha256
    config = instruction_config(
        layout_of(model.model), preprocess_bytes(model), frozen_sha256=digest
    )
    config["server-round"] = number
    for name, value in more.items():
        config[name] = value
    content = RecordDict({ARRAYS: weights_record(pack(model.model)), CONFIG: config})
    return Message(content, 3, "train")
