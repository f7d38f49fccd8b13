"""Kinds of problem: targets in canonical form, losses, and what is refused with which words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset, TensorDataset

import fedcore
from fedcore.errors import DataError, TaskError
from fedcore.task.definition import Examples, Task
from fedcore.task.kinds.registry import KindName
from fedcore.training.batches import gather, gather_all
from fedcore.training.examples import canonical, task_examples
from fedcore.training.per_example.losses import is_mean

CLASSES = torch.tensor([0, 2, 1, 2])
INPUTS = torch.arange(8.0).reshape(4, 2)


def task_of(kind: KindName | fedcore.Kind = "classification", **changed: Any) -> Task:
    values: dict[str, Any] = {
        "model": lambda: nn.Linear(2, 3),
        "example_input": torch.zeros(2),
        **changed,
    }
    return Task(
        name="kinds",
        kind=kind,
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: data(CLASSES),
        **values,
    )


def data(targets: Tensor, inputs: Tensor = INPUTS) -> Examples:
    return TensorDataset(inputs, targets)  # type: ignore[return-value]


def read(task: Task, targets: Tensor, inputs: Tensor = INPUTS) -> tuple[Tensor, Tensor]:
    return gather_all(
        task_examples(task, lambda: data(targets, inputs), what="data of 'anna'", folder=None)
    )


class Lazy(Dataset[tuple[Tensor, Any]]):
    """Examples that are made when they are read."""

    def __init__(self, targets: list[Any]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return INPUTS[row], self.targets[row]


def test_data_in_canonical_form_are_read_as_they_are() -> None:
    plain = data(CLASSES)
    assert canonical(task_of(), plain, what="data") is plain
    part = Subset(plain, [2, 0])
    assert canonical(task_of(), part, what="data") is part


@pytest.mark.parametrize(
    "given",
    [
        *(CLASSES.to(one) for one in (torch.int32, torch.int16, torch.uint8, torch.float64)),
        CLASSES.float(),
        CLASSES[:, None],
        CLASSES[:, None].double(),
        functional.one_hot(CLASSES, 3),
        functional.one_hot(CLASSES, 3).float(),
        functional.one_hot(CLASSES, 3).bool(),
    ],
)
def test_class_targets_are_taken_where_the_meaning_is_plain(given: Tensor) -> None:
    task = task_of()
    _, targets = read(task, given)
    assert torch.equal(targets, CLASSES)
    assert targets.dtype == torch.long
    part = canonical(task, Subset(data(given), [3, 0]), what="data")  # type: ignore[arg-type]
    assert gather(part, [1, 0])[1].tolist() == [0, 2]


def test_python_numbers_and_bools_are_taken() -> None:
    lazy = canonical(task_of(), Lazy([0, 2, 1, 2]), what="data")  # type: ignore[arg-type]
    assert torch.equal(gather_all(lazy)[1], CLASSES)
    assert lazy[1][1].item() == 2
    two = task_of(model=lambda: nn.Linear(2, 2))
    assert read(two, torch.tensor([True, False, True, True]))[1].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("given", "row", "said"),
    [
        (CLASSES + 1, 1, "target is 3, expected a whole number from 0 to 2 .* subtract 1"),
        (torch.tensor([0, 2, -1, 2]), 2, "target is -1, .* ignore_index=-1"),
        (torch.tensor([0, 2, 255, 2]), 2, "target is 255, .* ignore_index=255"),
        (torch.tensor([0, 7, 0, 2]), 1, "target is 7, .* give the model outputs for each class"),
        (torch.tensor([0, 0.5, 0, 2]), 1, "target is 0.5, .* kind='regression'"),
        (torch.tensor([0, torch.nan, 0, 2]), 1, "target is nan, expected a whole number"),
        (torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]]), 1, "kind='multilabel'"),
        (torch.zeros(4, 5), 0, r"of shape \(5,\), .* kind='multilabel'"),
        (CLASSES.to(torch.complex64), 0, "complex64, expected whole numbers"),
    ],
)
def test_a_target_that_needs_a_guess_is_refused_with_its_row(
    given: Tensor, row: int, said: str
) -> None:
    with pytest.raises(DataError, match=rf"^data of 'anna': row {row}\b.*{said}"):
        read(task_of(), given)


def test_a_row_is_named_by_its_number_in_the_data_set() -> None:
    bad = data(torch.tensor([0, 1, 2, 9]))
    part = canonical(task_of(), Subset(bad, [0, 3]), what="data of 'ben'")  # type: ignore[arg-type]
    assert gather(part, [0])[1].tolist() == [0]  # one row does not keep others from being read
    with pytest.raises(DataError, match=r"^data of 'ben': row 1: the target is 9"):
        gather(part, [0, 1])


def test_text_is_refused_with_the_client_and_the_remedy() -> None:
    lazy = canonical(task_of(), Lazy([0, "high", 1]), what="data of 'anna'")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^data of 'anna': row 1: .* text 'high'.*`labels`"):
        gather_all(lazy)


@pytest.mark.parametrize(
    ("kind", "outputs", "given", "expected"),
    [
        ("binary", 1, torch.tensor([True, False, True, False]), [[1.0], [0.0], [1.0], [0.0]]),
        ("binary", 1, torch.tensor([[1], [0], [1], [0]]).short(), [[1.0], [0.0], [1.0], [0.0]]),
        ("multilabel", 2, torch.eye(4)[:, :2].long(), torch.eye(4)[:, :2].tolist()),
        ("regression", 1, torch.tensor([1, 2, 3, 4]).double(), [1.0, 2.0, 3.0, 4.0]),
        ("regression", 1, torch.tensor([1, 2, 3, 4]).int(), [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_targets_of_other_kinds(kind: KindName, outputs: int, given: Tensor, expected: Any) -> None:
    _, targets = read(task_of(kind, model=lambda: nn.Linear(2, outputs)), given)
    assert targets.tolist() == expected
    assert targets.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "outputs", "given", "said"),
    [
        ("binary", 1, torch.tensor([1, 2, 1, 2]), "row 1 .*is 2, expected 0 or 1.*subtract 1"),
        ("binary", 1, torch.tensor([1, -1, 1, 1]), "row 1: .*is -1, .*ignore_index=-1"),
        ("binary", 1, torch.eye(4)[:, :2], "kind='classification' for one-hot"),
        ("multilabel", 3, CLASSES, "expected 0 or 1 for each of 3 labels.*kind='classification'"),
        ("multilabel", 2, torch.full((4, 2), 0.5), "0.5, expected 0 or 1"),
        ("regression", 2, torch.zeros(4), "as many numbers as outputs"),
        ("regression", 1, torch.zeros(4, dtype=torch.complex64), "expected real numbers"),
    ],
)
def test_targets_of_other_kinds_are_refused(
    kind: KindName, outputs: int, given: Tensor, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read(task_of(kind, model=lambda: nn.Linear(2, outputs)), given)


def dense(kind: KindName, **changed: Any) -> Task:
    """A task whose model gives 3 classes at 2 x 2 positions, or at 2 positions of a sequence."""
    shape = (3, 2, 2) if kind == "segmentation" else (2, 3)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, torch.Size(shape).numel()), nn.Unflatten(1, shape))

    return task_of(kind, model=model, **changed)


def test_dense_targets_are_taken_in_their_usual_forms() -> None:
    numbers = torch.randint(3, (4, 2, 2), generator=torch.Generator().manual_seed(0))
    for one in (
        numbers.to(torch.uint8),
        numbers[:, None],
        numbers.double(),
        functional.one_hot(numbers, 3).movedim(-1, 1),
    ):
        assert torch.equal(read(dense("segmentation"), one)[1], numbers)
    with pytest.raises(DataError, match=r"target of shape \(3, 3\).*positions \(2, 2\)"):
        read(dense("segmentation"), torch.zeros(4, 3, 3))
    void = numbers.clone()
    void[2, 0, 1] = 255
    with pytest.raises(DataError, match=r"row 2: the target is 255.*ignore_index=255"):
        read(dense("segmentation"), void)


def test_sequences_leave_out_positions_without_a_target() -> None:
    targets = torch.tensor([[0, -100], [2, 1], [-100, -100], [1, 1]])
    task = dense("sequence")
    assert torch.equal(read(task, targets)[1], targets)
    outputs = torch.randn(4, 2, 3, requires_grad=True)
    loss = task.loss_of(outputs, targets)
    each = functional.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
    own = [each[0, 0], each[1].mean(), torch.zeros(()), each[3].mean()]
    assert torch.allclose(loss, torch.stack(own).mean())
    loss.backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert not outputs.grad[2].any()
    right = functional.one_hot(targets.clamp(min=0), 3).float()
    assert {one.name: one.compute(right, targets) for one in task.metrics}["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("kind", "outputs", "said"),
    [
        ("classification", 1, "Set kind='binary' for one logit"),
        ("binary", 3, "set kind='classification'"),
        ("segmentation", 3, r"\(3,\); kind 'segmentation' takes \(C, \.\.\.\)"),
        ("next_token", 3, "set kind='classification' for one class an input"),
    ],
)
def test_outputs_of_another_kind_are_refused_before_training(
    kind: KindName, outputs: int, said: str
) -> None:
    with pytest.raises(TaskError, match=f"(?s)its model's outputs.*{said}.*Nothing was trained"):
        task_of(kind, model=lambda: nn.Linear(2, outputs)).check_model()


def test_a_dense_answer_is_no_classification() -> None:
    task = replace(dense("segmentation"), kind="classification", loss=None, metrics=())
    with pytest.raises(TaskError, match="Set kind='segmentation'"):
        task.check_model()


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_losses_are_torchs(kind: KindName, smoothing: float) -> None:
    rng = torch.Generator().manual_seed(1)
    outputs = torch.randn(6, 3 if kind == "multilabel" else 1, generator=rng)
    targets = torch.randint(2, tuple(outputs.shape), generator=rng).float()
    weights = (2.0, 0.5, 3.0) if kind == "multilabel" else (0.5, 4.0)
    loss = task_of(kind, class_weights=weights, label_smoothing=smoothing).loss_of
    soft = targets * (1 - smoothing) + smoothing / 2
    each = functional.binary_cross_entropy_with_logits(
        outputs,
        soft,
        reduction="none",
        pos_weight=torch.tensor(weights) if kind == "multilabel" else None,
    )
    if kind == "binary":
        each = each * torch.tensor(weights)[targets.long()]
    assert torch.allclose(loss(outputs, targets), each.mean())


OPTIONS = st.fixed_dictionaries(
    {
        "class_weights": st.sampled_from([(), (1.0, 19.0, 0.5)]),
        "ignore_index": st.sampled_from([None, -1]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
    }
)


@settings(max_examples=25, deadline=None)
@given(options=OPTIONS, seed=st.integers(0, 1000), dense=st.booleans())
def test_weights_smoothing_and_ignored_targets_never_couple_examples(
    options: dict[str, Any], seed: int, dense: bool
) -> None:
    """A batch's loss is the mean of its examples' own, which example-level privacy needs."""
    rng = torch.Generator().manual_seed(seed)
    shape = (3, 2, 2) if dense else (3,)
    outputs = torch.randn(5, *shape, generator=rng)
    low = 0 if options["ignore_index"] is None else -1
    targets = torch.randint(low, 3, (5, *shape[1:]), generator=rng)
    loss = task_of("segmentation" if dense else "classification", **options).loss_of
    assert is_mean(loss, outputs, targets)
    whole = loss(outputs, targets)
    assert torch.isfinite(whole)
    weight = options["class_weights"]
    each = functional.cross_entropy(
        outputs,
        targets,
        weight=torch.tensor(weight) if weight else None,
        ignore_index=-1,
        label_smoothing=options["label_smoothing"],
        reduction="none",
    ).reshape(5, -1)
    counted = (targets >= 0).reshape(5, -1).sum(dim=1)
    divisor = counted.clamp(min=1) if dense else torch.ones(5)
    assert torch.allclose(whole, (each.sum(dim=1) / divisor).mean(), atol=1e-6)


def test_ignored_rows_count_in_neither_loss_nor_metrics() -> None:
    task = task_of(ignore_index=-1)
    targets = torch.tensor([0, -1, 1, -1])
    assert torch.equal(read(task, targets)[1], targets)
    outputs = functional.one_hot(torch.tensor([0, 2, 2, 2]), 3).float()
    assert task.primary.compute(outputs, targets) == 0.5
    with pytest.raises(DataError, match="row 3: the target is -100"):
        read(task, torch.tensor([0, -1, 1, -100]))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"class_weights": (1.0, -1.0, 1.0)}, "at least 0"),
        ({"class_weights": (1.0, float("nan"), 1.0)}, "finite"),
        ({"class_weights": (0.0, 0.0, 0.0)}, "not all 0"),
        ({"class_weights": 3}, "one number for each class"),
        ({"label_smoothing": 1.0}, "from 0 to below 1"),
        ({"ignore_index": 1.5}, "expected a whole number"),
        ({"ignore_index": True}, "expected a whole number"),
        ({"kind": "regression", "class_weights": (1.0, 2.0)}, "no meaning for kind 'regression'"),
        ({"loss": nn.CrossEntropyLoss(), "label_smoothing": 0.1}, "leave `loss` out"),
        ({"kind": "clustering"}, "allowed: classification, regression"),
        ({"kind": nn.Linear}, "such as kind=MyKind()"),
    ],
)
def test_settings_that_nothing_would_use_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said.replace("(", r"\(").replace(")", r"\)")):
        task_of(**changed)


def test_there_is_a_weight_for_each_class() -> None:
    with pytest.raises(TaskError, match="2 class weights for 3 outputs"):
        task_of(class_weights=(1.0, 2.0)).check_model()
    assert task_of(class_weights=(1.0, 2.0, 3.0)).check_model() == ""


def test_a_copy_of_a_task_keeps_its_usual_loss() -> None:
    task = task_of(class_weights=(1.0, 2.0, 3.0), label_smoothing=0.1)
    assert not replace(task, name="other").has_own_loss
    assert replace(task, name="other").loss == task.loss


def test_own_kinds_state_a_name_a_loss_and_metrics() -> None:
    class Bare(fedcore.Kind):
        name = "bare"

    with pytest.raises(TaskError, match="no usual loss or metrics"):
        task_of(Bare())
    own = task_of(Bare(), loss=nn.MSELoss(), metrics=(fedcore.RMSE,))
    assert own.problem.name == "bare"
    Bare.name = "Not a name"
    with pytest.raises(TaskError, match="lower-case letters"):
        task_of(Bare(), loss=nn.MSELoss(), metrics=(fedcore.RMSE,))
    Bare.name = "binary"
    with pytest.raises(TaskError, match="name of the built-in kind"):
        task_of(Bare(), loss=nn.MSELoss(), metrics=(fedcore.RMSE,))
