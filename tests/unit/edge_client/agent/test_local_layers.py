"""A device's own layers outlive its process, together with the reply that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree

from edge_client.agent import loop
from edge_client.agent.run import DeviceSetup
from edge_client.agent.wake import Signals
from edge_client.device_folder import DeviceFolder, lock_device_folder
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.flower.fleet_pull import AnnouncedMessage
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated
from fedcore.task.model import build_model
from fedcore.updates.local import load_local, local_tensors
from fedcore.updates.messages import ARRAYS, MODEL
from tests.unit.edge_client.agent.asked import PRIVATE, RUN_ID, Link, instruction, kit_in, run_of
from tests.unit.fedcore.clients import make_task

TASK = make_task()


def local_run(**privacy: Any) -> RunConfig:
    run = run_of(privacy=privacy)
    name = list(build_model(TASK, run).model.state_dict())[-1]
    return run.model_copy(update={"client": run.client.model_copy(update={"local": (name,)})})


class Device:
    """A device whose processes end between two messages."""

    def __init__(self, root: Path, run: RunConfig) -> None:
        self.root, self.run, self.kit, self.link = root, run, kit_in(root), Link(run)

    def answer(self, number: int) -> Message:
        """Answers the message of a round in a new process's place."""
        assume_identity(RUN_ID)
        with lock_device_folder(self.root / "device") as folder:
            made = (self.kit, TASK, self.root / "task.py", OPEN_POLICY, folder, Simulated(3))
            found = AnnouncedMessage(instruction(TASK, self.run, number), ObjectTree())
            runs: dict[int, Any] = {}
            loop._answer_or_reject(DeviceSetup(*made), cast(Any, self.link), Signals(), runs, found)
        return self.link.answers[-1]

    @property
    def layers(self) -> dict[str, torch.Tensor]:
        """The local layers on disk."""
        record = DeviceFolder(self.root / "device").state("run")["fedcore.local"]
        model = build_model(TASK, self.run).model
        load_local(cast(Any, record)["state"], model)
        return {name: one.detach().clone() for name, one in local_tensors(model).items()}


def bits(reply: Message) -> bytes:
    assert not reply.has_error(), reply.error
    return bytes(reply.content.array_records[ARRAYS][MODEL].data)


@pytest.mark.parametrize("privacy", [{}, PRIVATE], ids=["plain", "private"])
def test_layers_go_on_from_round_to_round(tmp_path: Path, privacy: dict[str, Any]) -> None:
    device = Device(tmp_path, local_run(**privacy))
    initial = local_tensors(build_model(TASK, device.run).model)
    first = bits(device.answer(1))
    (name,) = initial
    after_one = device.layers[name]
    assert not torch.equal(after_one, initial[name])
    assert bits(device.answer(1)) == first  # the same message: the reply on disk, no training
    assert torch.equal(device.layers[name], after_one)
    device.answer(2)
    assert not torch.equal(device.layers[name], after_one)


def test_a_process_that_dies_before_its_reply_is_stored_trains_from_the_same_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path, local_run())
    device.answer(1)
    before = device.layers
    with monkeypatch.context() as patch:

        def die(*_: Any) -> None:
            raise SystemExit(9)

        patch.setattr(DeviceFolder, "store_reply", die)
        with pytest.raises(SystemExit):
            device.answer(2)
    assert all(torch.equal(one, before[name]) for name, one in device.layers.items())
    again = bits(device.answer(2))
    other_root = tmp_path / "other"
    other_root.mkdir()
    other = Device(other_root, device.run)
    other.answer(1)
    assert bits(other.answer(2)) == again
