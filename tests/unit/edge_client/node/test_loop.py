"""One message, answered: whatever a server puts into it, the device is there for the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree

from edge_client.node import loop
from edge_client.node.ledger_book import read_book
from edge_client.node.state import own
from edge_client.node.wake import Signals
from fedcore.config import RunConfig
from fedcore.crypto.keys import new_key, public_bytes, save_key
from fedcore.errors import InvalidUpdate
from fedcore.flower.fleet_pull import Announced
from fedcore.flower.identity import assume_identity
from fedcore.model import build_model, preprocess_bytes
from fedcore.owner import OPEN_POLICY, DataSet, OwnerPolicy
from fedcore.privacy.ledger import ledger_in
from fedcore.task import Task
from fedcore.updates.messages import ARRAYS, CONFIG, REFUSED, instruction_config, weights_record
from fedcore.updates.pack import layout_of, pack
from server.live.settings import device_settings
from tests.unit.fedcore.clients import make_task

RUN_ID = 7
PRIVATE = {
    "unit": "example",
    "target_delta": 1e-3,
    "noise_multiplier": 1.0,
    "max_epsilon": 1e6,
    "accountant": "rdp",
}


@dataclass
class Link:
    """In place of a server."""

    run: RunConfig
    node_id: int = 3
    answers: list[Message] = field(default_factory=list)

    def settings(self, run_id: int) -> dict[str, str]:
        return device_settings(self.run, instance="first")

    def fetch(self, found: Any, *, limit_bytes: int) -> Message:
        message: Message = found.message
        return message

    def answer(self, reply: Message) -> None:
        self.answers.append(reply)


def instruction(task: Task, run: RunConfig, number: int, **more: Any) -> Message:
    model = build_model(task, run)
    config = instruction_config(layout_of(model.model), preprocess_bytes(model))
    config["server-round"] = number
    for name, value in more.items():
        config[name] = value
    content = RecordDict({ARRAYS: weights_record(pack(model.model)), CONFIG: config})
    return Message(content, 3, "train")


@pytest.mark.parametrize(
    ("strategy", "wrong"),
    [
        ("DifferentialPrivacyClientSideFixedClipping", "lots"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "lots"),
        ("DifferentialPrivacyClientSideFixedClipping", [1.0, 2.0]),
    ],
)
@pytest.mark.parametrize("privacy", [PRIVATE, {}], ids=["private", "plain"])
def test_a_bad_number_for_a_mod_refuses_one_message_and_ends_nothing(
    tmp_path: Path, strategy: str, wrong: Any, privacy: dict[str, Any]
) -> None:
    task = make_task()
    run = RunConfig.model_validate(
        {
            "name": "run",
            "task": "task.py",
            "federation": {"rounds": 9, "strategy": strategy},
            "client": {"batch_size": 8, "device": "cpu"},
            "privacy": privacy,
        }
    )
    kit_folder = tmp_path / "kit"
    kit_folder.mkdir()
    key = new_key()
    save_key(kit_folder / "key.pem", key)
    kit = SimpleNamespace(
        name="anna", folder=kit_folder, key_path=kit_folder / "key.pem", public=public_bytes(key)
    )
    link, runs = Link(run), dict[int, Any]()
    assume_identity(RUN_ID)
    with own(tmp_path / "device") as folder:
        device = loop.Device(cast(Any, kit), task, tmp_path / "task.py", OPEN_POLICY, folder)
        for number, norm in ((1, wrong), (2, 0.5)):
            message = instruction(task, run, number, clipping_norm=norm)
            found = Announced(message, ObjectTree())
            loop._answer_or_say_why(device, cast(Any, link), Signals(), runs, found)
            charged = len(ledger_in(folder.state("run")).charges)
            assert charged == (number if privacy else 0)
    refused, done = link.answers
    assert refused.error.code == REFUSED + InvalidUpdate.exit_code
    if privacy:
        assert refused.error.reason == "client 'anna': InvalidUpdate; its log says more"
    else:
        assert "what runs around training" in (refused.error.reason or "")
    assert not done.has_error()


def test_files_that_come_to_a_named_data_set_in_mid_run_count_at_once(tmp_path: Path) -> None:
    """Or data could be trained on under another's budget, by moving files for a while."""
    task = make_task()
    run = RunConfig.model_validate(
        {
            "name": "run",
            "task": "task.py",
            "federation": {"rounds": 9},
            "client": {"batch_size": 8, "device": "cpu"},
            "privacy": PRIVATE,
        }
    )
    kit_folder, ward, other = tmp_path / "kit", tmp_path / "ward", tmp_path / "other"
    for folder_made in (kit_folder, ward, other):
        folder_made.mkdir()
    (ward / "a.csv").write_text("1,2\n")
    (other / "b.csv").write_text("3,4\n")
    key = new_key()
    save_key(kit_folder / "key.pem", key)
    kit = SimpleNamespace(
        name="anna", folder=kit_folder, key_path=kit_folder / "key.pem", public=public_bytes(key)
    )
    sets = tuple(DataSet(name=path.name, path=str(path), max_epsilon=1e5) for path in (ward, other))
    link, runs = Link(run), dict[int, Any]()
    assume_identity(RUN_ID)
    with own(tmp_path / "device") as folder:
        owner = OwnerPolicy(data=str(ward), datasets=sets)
        device = loop.Device(cast(Any, kit), task, tmp_path / "task.py", owner, folder)
        opened = []
        for number in (1, 2, 3, 4):
            if number == 3:
                (other / "b.csv").rename(ward / "b.csv")
            found = Announced(instruction(task, run, number), ObjectTree())
            loop._answer_or_say_why(device, cast(Any, link), Signals(), runs, found)
            opened.append(runs[RUN_ID])
        assert opened[0] is opened[1] is not opened[2] is opened[3]
        charges = read_book(folder.path)
        assert charges is not None
        labels = [one.data for one in charges.runs["run"]]
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert all(not answer.has_error() for answer in link.answers)
