from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, RecordDict
from torch import nn

from fedcore.errors import InvalidUpdate, TaskError
from fedcore.updates.frozen import (
    NO_FROZEN,
    FrozenState,
    check_unchanged,
    checksums,
    freeze,
    frozen_parameters,
    frozen_state,
    load_frozen,
    received,
)
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    FROZEN,
    Instruction,
    instruction_config,
    read_instruction,
    weights_record,
)
from fedcore.updates.pack import layout_of, pack


class Adapted(nn.Module):
    """A frozen base, tied to a second name, and a head that is trained."""

    def __init__(self, value: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.full((3, 2), value, dtype=dtype), requires_grad=False)
        self.again = self.base
        self.codes = nn.Parameter(torch.tensor([1, 2**40]), requires_grad=False)
        self.head = nn.Linear(2, 2)


def instruction_of(model: nn.Module, state: FrozenState, *, carried: bool = True) -> Instruction:
    config = instruction_config(layout_of(model), b"", frozen_sha256=state.sha256)
    config["server-round"] = 3
    content = RecordDict({ARRAYS: weights_record(pack(model)), CONFIG: config})
    if carried:
        content[FROZEN] = state.record
    return read_instruction(content)


def test_frozen_parameters_are_no_part_of_a_vector_and_travel_with_every_bit() -> None:
    source, target = Adapted(0.1), Adapted()
    assert list(frozen_parameters(source)) == ["base", "codes"]
    assert layout_of(source).names == ("head.weight", "head.bias")
    instruction = instruction_of(source, frozen_state(source))
    state = received(instruction)
    assert state == frozen_state(source)
    load_frozen(state, target)
    assert torch.equal(target.again, source.base)
    assert target.codes.tolist() == [1, 2**40]
    assert frozen_state(target).sha256 == instruction.frozen_sha256


def test_patterns_freeze_by_name_and_fit() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    freeze(model, ["0.*"])
    assert list(frozen_parameters(model)) == ["0.weight", "0.bias"]
    with pytest.raises(
        TaskError, match=r"client\.frozen: '1\.\*' matches no parameter .* 0\.weight"
    ):
        freeze(model, ["1.*"])
    tied = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    tied["other"].weight = tied["one"].weight
    with pytest.raises(TaskError, match=r"client\.frozen: other\.weight shares its values with"):
        freeze(tied, ["one.*"])
    freeze(tied, ["one.*", "other.*"])
    assert not any(p.requires_grad for p in tied.parameters())


def test_a_model_without_frozen_parameters_sends_what_it_always_did() -> None:
    model = nn.Linear(2, 1)
    assert frozen_state(model) is NO_FROZEN
    instruction = instruction_of(model, NO_FROZEN, carried=False)
    assert (instruction.frozen_sha256, instruction.frozen) == ("", None)
    assert received(instruction) is NO_FROZEN
    assert set(instruction_config(layout_of(model), b"")) == {"layout", "preprocess"}


def test_others_than_those_that_are_named_are_refused() -> None:
    one, other = Adapted(1.0), Adapted(2.0)
    instruction = instruction_of(one, frozen_state(one))
    with pytest.raises(InvalidUpdate, match=r"round 3: this client's frozen parameters are not"):
        received(replace(instruction, frozen=None))
    record = frozen_state(other).record
    with pytest.raises(InvalidUpdate, match="do not have the digest that the server named"):
        received(replace(instruction, frozen=record[FROZEN]))
    wide = Array(np.frombuffer(frozen_state(one).raw, np.uint8).astype(np.uint16))
    with pytest.raises(InvalidUpdate, match="do not have the digest"):
        received(replace(instruction, frozen=wide))


@pytest.mark.parametrize(
    "other", [nn.Linear(2, 2), Adapted(dtype=torch.float32)], ids=["none are frozen", "dtype"]
)
def test_those_of_another_model_are_refused(other: nn.Module) -> None:
    with pytest.raises(InvalidUpdate, match=r"do not fit this task: \d tensors"):
        load_frozen(frozen_state(Adapted()), other)
    with pytest.raises(InvalidUpdate, match="do not fit this task: not readable"):
        load_frozen(FrozenState(b"no safetensors"), other)


@pytest.mark.parametrize("name", ["base", "codes"])
def test_training_that_changes_one_is_named(name: str) -> None:
    model = Adapted()
    before = checksums(model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
        check_unchanged(before, model)
        model.get_parameter(name).flatten()[0] += 1
    with pytest.raises(TaskError, match=f"training has changed {name}, although requires_grad"):
        check_unchanged(before, model)
