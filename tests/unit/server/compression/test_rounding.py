from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import CompressionError
from fedcore.task.kinds.regression import Regression
from fedcore.task.model import FullModel
from server.cloud import CloudData
from server.compression.compress import compress
from server.compression.export import export_with_scopes
from server.compression.quantise import calibrate, int8_static
from server.compression.rounding import train_for_rounding
from server.compression.runtime import answer, open_session
from server.compression.train_close import CloudTraining


class Uneven(nn.Module):
    """In each row of the middle layer one weight is far larger, so 8 bits round the others away.

    What it multiplies hardly varies.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 1)
        with torch.no_grad():
            self.first.weight[0] /= 100
            self.middle.weight[:, 0] = 20 * self.middle.weight[:, 0].sign()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).relu())  # type: ignore[no-any-return]


def error_in_8_bits(module: nn.Module, told: Tensor, inputs: Tensor) -> float:
    exported = export_with_scopes(module, inputs[:2], labels=(), kind="regression")
    onnx = int8_static(calibrate(exported.onnx, inputs), reduce_range=False)
    found = answer(open_session(onnx, threads=1), inputs.numpy())
    return float(np.sqrt(np.mean((found - told.numpy()) ** 2)))


def test_weights_that_learn_with_rounding_lose_less_in_8_bits() -> None:
    module = Uneven().eval()
    inputs = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        told = module(inputs)
    before = {name: each.clone() for name, each in module.state_dict().items()}
    trained = train_for_rounding(
        module,
        inputs[:2],
        CloudTraining(
            TensorDataset(inputs, told),
            nn.functional.mse_loss,
            Regression(),
            Finetune(learning_rate=0.002, optimizer="adam"),
            seed=0,
        ),
        epochs=25,
        reduce_range=False,
    )
    assert error_in_8_bits(trained, told, inputs) < 0.7 * error_in_8_bits(module, told, inputs)
    assert all(torch.equal(each, module.state_dict()[name]) for name, each in before.items())
    assert set(trained.state_dict()) == set(before)  # nothing of the training is left
    assert all(not each._forward_pre_hooks for each in trained.modules())


def test_a_model_of_one_layer_is_not_trained_for_nothing() -> None:
    data = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    with pytest.raises(CompressionError, match="other than the last one"):
        train_for_rounding(
            nn.Linear(3, 1),
            torch.zeros(2, 3),
            CloudTraining(data, nn.functional.mse_loss, Regression(), Finetune(), seed=0),
            epochs=1,
            reduce_range=False,
        )


@pytest.mark.parametrize("reduce_range", [False, True])
def test_convolutions_and_tied_weights_train(
    fresh: Callable[[Task], FullModel], quick_run: Callable[..., RunConfig], reduce_range: bool
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.two.weight = self.one.weight
            self.last = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            found = self.norm(self.conv(x)).mean(dim=1).flatten(1)
            return self.last(self.two(self.one(found).relu()).relu())  # type: ignore[no-any-return]

    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,)))
    task = Task(
        name="tied",
        kind="classification",
        model=Tied,
        clients=lambda folder: ["one"],
        client_data=lambda client, folder: data,
        example_input=torch.zeros(1, 8, 8),
    )
    run = quick_run(
        candidates=("fp32", "int8_trained"), max_accuracy_drop=1e9, reduce_range=reduce_range
    )
    found = compress(run, task, fresh(task), CloudData(data, data), progress=lambda line: None)
    assert set(found.files) == {"fp32", "int8_trained"}, found.records
    assert found.records[1].bytes < found.records[0].bytes
