from __future__ import annotations

import copy

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn

from fedcore.errors import DataError, TaskError, TrainingDiverged
from fedcore.updates.frozen import frozen_state, load_frozen
from fedcore.updates.local import (
    load_local,
    local_names,
    local_state,
    local_tensors,
    mark_local,
    read_local,
    write_local,
)
from fedcore.updates.pack import layout_of, pack


class Net(nn.Module):
    """A body with statistics of batches and a frozen layer, and two heads that share weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.head, self.again = nn.Linear(4, 2), nn.Linear(4, 2)
        self.again.weight = self.head.weight


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
HEADS = {"head.weight", "head.bias", "again.weight", "again.bias"}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), set()),
        (("head.*", "again.*"), HEADS),
        (("BatchNorm*",), {f"body.1.{name}" for name in NORM}),
        (("body.1.running_*",), {"body.1.running_mean", "body.1.running_var"}),
        (("fixed.*",), set()),
        (("fixed.*", "body.0.bias"), {"body.0.bias"}),
    ],
)
def test_patterns_match_names_and_classes_of_layers(
    patterns: tuple[str, ...], names: set[str]
) -> None:
    model = Net()
    before = layout_of(model)
    mark_local(model, patterns)
    assert local_names(model) == names
    assert local_names(copy.deepcopy(model)) == names
    assert set(layout_of(model).names) == set(before.names) - names
    assert len(pack(model)) == layout_of(model).size
    assert len(local_tensors(model)) == len(names) - ("again.weight" in names)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("hed.*",), "'hed.*' matches no state of the model"),
        (("Head.*",), "'Head.*' matches no state"),
        (("head.*",), "again.weight shares its values with a layer that is to stay on clients"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(TaskError, match=message.replace("*", r"\*")):
        mark_local(Net(), patterns)


def marked(*patterns: str) -> Net:
    model = Net()
    mark_local(model, patterns)
    return model


def test_what_is_kept_comes_back_with_every_bit() -> None:
    source, target = (marked("head.*", "again.*", "BatchNorm1d") for _ in range(2))
    source.body(torch.randn(5, 3))
    raw = local_state(source)
    load_local(raw, target)
    assert target.again.weight is target.head.weight
    assert target.body[1].num_batches_tracked == 1
    state = target.state_dict()
    for name in local_names(source):
        assert torch.equal(state[name], source.state_dict()[name])
    assert not torch.equal(state["body.0.weight"], source.body[0].weight)
    assert local_state(Net()) == b""


def test_what_another_model_kept_is_refused() -> None:
    raw = local_state(marked("BatchNorm1d"))
    with pytest.raises(DataError, match="does not fit the task's model"):
        load_local(raw, marked("head.*", "again.*"))
    with pytest.raises(DataError, match="does not fit the task's model"):
        load_local(b"no safetensors", marked("BatchNorm1d"))


def test_values_that_are_not_finite_are_not_kept() -> None:
    model = marked("head.*", "again.*")
    with torch.no_grad():
        model.head.bias[0] = float("inf")
    with pytest.raises(TrainingDiverged, match=r"local layer head\.bias holds values that are not"):
        local_state(model)


def test_initial_values_travel_with_the_frozen_parameters() -> None:
    source, target = marked("head.*", "again.*"), marked("head.*", "again.*")
    load_frozen(frozen_state(source), target)
    assert torch.equal(target.again.weight, source.head.weight)
    assert torch.equal(target.fixed.weight, source.fixed.weight)
    assert not torch.equal(target.body[0].weight, source.body[0].weight)


def test_a_node_keeps_them_in_its_state() -> None:
    context = Context(1, 2, {}, RecordDict(), {})
    assert read_local(context) == b""
    write_local(context, b"layers")
    write_local(context, b"")  # a model without them changes nothing
    assert read_local(context) == b"layers"
