"""Models whose outputs cannot learn, or learn badly, are told in a sentence before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fedcore
from fedcore.errors import TaskError
from fedcore.observability.events import Noted
from fedcore.task.kinds.registry import KindName


class Net(nn.Module):
    """A linear layer, and what is made of its outputs."""

    def __init__(self, end: Callable[[Tensor], Tensor], outputs: int) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(2, outputs), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layer(x))


def task_of(
    end: Callable[[Tensor], Tensor], kind: KindName = "classification", outputs: int = 3
) -> fedcore.Task:
    inputs = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, 0] > 0).long()

    def data(*_: object) -> torch.utils.data.TensorDataset:
        return torch.utils.data.TensorDataset(inputs, targets)

    return fedcore.Task(
        name="ends",
        kind=kind,
        model=lambda: Net(end, outputs),
        clients=lambda folder: ["anna"],
        client_data=data,  # type: ignore[arg-type]
        example_input=torch.zeros(2),
    )


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda z: z.argmax(-1), "choices already, as argmax or one_hot"),
        (lambda z: z.argmax(-1, keepdim=True).float(), "carry no gradient"),
        (lambda z: functional.one_hot(z.argmax(-1), 3).float(), "choices already"),
        (lambda z: (z > 0).float(), "carry no gradient"),
        (lambda z: z.detach(), r"detach\(\), .data or no_grad\(\)"),
        (lambda z: torch.tensor(z.tolist()), r"detach\(\), .data or no_grad\(\)"),
    ],
)
def test_outputs_without_a_gradient_are_refused_before_a_run(
    end: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=f"(?s)its model's outputs .*{said}.*Nothing was trained"):
        fedcore.simulate(task_of(end), runs=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("end", "kind", "outputs", "named"),
    [
        (lambda z: z.softmax(-1), "classification", 3, "softmax"),
        (lambda z: z.softmax(-1).unsqueeze(1).squeeze(1), "classification", 3, "softmax"),
        (torch.sigmoid, "classification", 3, "sigmoid"),
        (torch.sigmoid, "binary", 1, "sigmoid"),
        (lambda z: z.sigmoid()[:, 0], "binary", 1, "sigmoid"),
        (functional.logsigmoid, "multilabel", 3, "logsigmoid"),
        (lambda z: z.log_softmax(-1), "multilabel", 3, "log_softmax"),
        (lambda z: z.log_softmax(-1), "classification", 3, ""),
        (lambda z: z, "classification", 3, ""),
        (lambda z: 2 * z.softmax(-1), "classification", 3, ""),
        (torch.sigmoid, "regression", 3, ""),
    ],
)
def test_a_model_that_ends_in_probabilities_is_noted(
    end: Callable[[Tensor], Tensor], kind: KindName, outputs: int, named: str
) -> None:
    said = task_of(end, kind, outputs).check_model()
    assert said.startswith(f"The model ends in {named}, ") if named else said == ""


def test_a_run_notes_it_before_its_first_round() -> None:
    told: list[object] = []
    fedcore.simulate(
        task_of(lambda z: z.softmax(-1)),
        progress=told.append,
        federation={"rounds": 1},
        simulation={"training": "loop", "workers": 1},
        compression={"candidates": ("fp32",), "timing_runs": 100},
    )
    noted = [one.text for one in told if isinstance(one, Noted)]
    assert noted[0].startswith("The model ends in softmax")
    assert isinstance(told[0], Noted)


def test_an_own_loss_may_take_probabilities() -> None:
    task = task_of(torch.sigmoid, "binary", 1)
    own = fedcore.Task(
        name="own",
        kind="binary",
        model=task.model,
        clients=task.clients,
        client_data=task.client_data,
        example_input=task.example_input,
        loss=nn.BCELoss(),
    )
    assert own.check_model() == ""
