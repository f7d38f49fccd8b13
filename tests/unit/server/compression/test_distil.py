from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import CompressionError
from fedcore.task.definition import size_of
from fedcore.task.model import FullModel
from fedcore.training.batches import gather_all
from server.cloud import CloudData
from server.compression.compress import compress
from server.compression.compressed import Compressed
from server.compression.distil import FEW, distil, widened
from server.compression.train_close import CloudTraining

QuickRun = Callable[..., RunConfig]


def taught(
    task: Task,
    model: FullModel,
    cloud: CloudData,
    student: Callable[[], nn.Module],
    seed: int = 0,
    epochs: int = 20,
) -> FullModel:
    return distil(
        model,
        student,
        torch.stack([task.example_input] * 2),
        CloudTraining(cloud.train, task.loss_of, task.problem, Finetune(), seed),
        epochs=epochs,
    )


def test_a_student_answers_as_its_teacher_does_with_fewer_weights(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData
) -> None:
    assert digits.student is not None
    before = {name: each.clone() for name, each in digits_model.state_dict().items()}
    student = taught(digits, digits_model, digits_cloud, digits.student)
    inputs, _ = gather_all(digits_cloud.heldout)
    with torch.inference_mode():
        own, told = student(inputs).argmax(1), digits_model(inputs).argmax(1)
    assert (own == told).float().mean() > 0.85  # of 108 images without mixtures: about 0.8
    sizes = [sum(p.numel() for p in each.parameters()) for each in (student, digits_model)]
    assert sizes[0] < sizes[1] / 5
    after = digits_model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())


def test_of_few_examples_it_sees_mixtures_within_a_limit_of_bytes(
    digits_cloud: CloudData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = widened(digits_cloud.train, seed=0)
    assert size_of(seen) == FEW
    inputs, targets = gather_all(seen)
    real = size_of(digits_cloud.train)
    given, labels = gather_all(digits_cloud.train)
    assert torch.equal(inputs[:real], given)
    assert set(targets.tolist()) == set(labels.tolist())
    assert (inputs[real:] <= given.max()).all()
    assert size_of(widened(seen, seed=0)) == FEW
    monkeypatch.setattr("server.compression.distil._MOST_BYTES", 10 * inputs[0].nbytes)
    assert size_of(widened(digits_cloud.train, seed=0)) == real + 10


def test_its_weights_are_the_seeds(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData
) -> None:
    assert digits.student is not None
    one, two, other = (
        next(taught(digits, digits_model, digits_cloud, digits.student, seed, 1).parameters())
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (lambda: nn.Linear(64, 9), r"gives outputs of shape \(9,\), and the model \(10,\)"),
        (lambda: nn.Linear(63, 10), "student fails: RuntimeError"),
        (lambda: 1 / 0, "student fails: ZeroDivisionError"),
        (lambda: None, "student fails: AttributeError"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(
    digits: Task,
    digits_model: FullModel,
    digits_cloud: CloudData,
    student: Callable[[], nn.Module],
    said: str,
) -> None:
    with pytest.raises(CompressionError, match=said):
        taught(digits, digits_model, digits_cloud, student)


def test_without_a_student_the_others_are_built(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    run = quick_run(candidates=("fp32", "distilled", "distilled_int8"))
    found = compress(
        run, replace(digits, student=None), digits_model, digits_cloud, progress=lambda line: None
    )
    assert list(found.files) == ["fp32"]
    assert all("has no student" in each.reason for each in found.records[1:])


def test_students_of_named_inputs_get_the_names(
    quick_run: QuickRun, fresh: Callable[..., FullModel]
) -> None:
    class Sum(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(3, width), nn.Linear(width, 2)

        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            both = torch.cat([inputs["pair"], inputs["age"]], dim=1)
            return {"logits": self.last(self.hidden(both).relu())}

    rows = [({"pair": torch.randn(2), "age": torch.randn(1)}, n % 2) for n in range(60)]
    task = Task(
        name="named",
        kind="classification",
        model=lambda: Sum(64),
        student=lambda: Sum(4),
        clients=lambda folder: ["one"],
        client_data=lambda client, folder: rows,  # type: ignore[arg-type,return-value]
        example_input={"pair": torch.zeros(2), "age": torch.zeros(1)},  # type: ignore[arg-type]
    )
    task = replace(task)  # a copy wraps nothing twice
    data = TensorDataset(torch.randn(60, 3), torch.arange(60) % 2)
    run = quick_run(candidates=("fp32", "distilled"), max_accuracy_drop=1e9, min_agreement=0)
    found = compress(run, task, fresh(task), CloudData(data, data), progress=lambda line: None)
    assert len(found.files["distilled"]) < len(found.files["fp32"])


def test_records_say_what_was_trained(compressed: Compressed) -> None:
    sizes = {each.name: each.bytes for each in compressed.records}
    assert sizes["distilled_int8"] < sizes["distilled"] < sizes["fp32"] / 4
