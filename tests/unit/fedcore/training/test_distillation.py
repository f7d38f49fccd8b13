"""Training that is held to the answers of a frozen teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedcore.task.definition import Loss
from fedcore.task.kinds.registry import KindName
from fedcore.training.distillation import beside_teacher
from tests.unit.fedcore.clients import make_task

INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def of(kind: KindName) -> tuple[nn.Module, Loss, Tensor]:
    """A small model of a kind, the kind's usual loss, and targets for `INPUTS`."""
    rng = torch.Generator().manual_seed(2)
    if kind == "regression":
        return nn.Linear(6, 1), make_task(kind=kind).loss_of, torch.randn(8, generator=rng)
    targets = torch.randint(3, (8,) if kind == "classification" else (8, 2), generator=rng)
    layers = [nn.Linear(6, 3 if kind == "classification" else 6)]
    if kind == "next_token":
        layers.append(nn.Unflatten(1, (2, 3)))  # type: ignore[arg-type]
    return nn.Sequential(*layers), make_task(kind=kind).loss_of, targets


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None])


@pytest.mark.parametrize("kind", ["classification", "regression", "next_token"])
def test_without_weight_it_is_the_loss_itself(kind: KindName) -> None:
    model, loss, targets = of(kind)
    trained, combined = beside_teacher(model, model, loss, make_task(kind=kind).problem, weight=0.0)
    assert torch.equal(combined(trained(INPUTS), targets), loss(model(INPUTS), targets))


@pytest.mark.parametrize("kind", ["classification", "regression", "next_token"])
def test_the_teachers_own_answers_pull_nowhere(kind: KindName) -> None:
    model, loss, targets = of(kind)
    trained, combined = beside_teacher(
        model, model, loss, make_task(kind=kind).problem, weight=0.999999
    )
    combined(trained(INPUTS), targets).backward()
    assert gradient(model).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["classification", "regression", "next_token"])
def test_a_model_that_moved_is_pulled_back(kind: KindName) -> None:
    """Held to the teacher alone, a model comes back to it, whatever the labels say."""
    model, loss, targets = of(kind)
    teacher, _, _ = of(kind)
    trained, combined = beside_teacher(
        model, teacher, loss, make_task(kind=kind).problem, weight=0.999
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def gap() -> float:
        answers = [each(INPUTS).detach() for each in (model, teacher)]
        if kind != "regression":  # a constant added to all logits changes no answer
            answers = [each.softmax(-1) for each in answers]
        return (answers[0] - answers[1]).abs().max().item()

    before = gap()
    for _ in range(300):
        optimizer.zero_grad()
        combined(trained(INPUTS), targets).backward()
        optimizer.step()
    assert gap() < 0.05 < before


def test_the_teacher_is_neither_trained_nor_in_training_mode_nor_shared() -> None:
    student = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    teacher = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    held = {name: each.clone() for name, each in teacher.state_dict().items()}
    loss = nn.functional.cross_entropy
    trained, combined = beside_teacher(
        student, teacher, loss, make_task(kind="classification").problem, weight=0.5
    )
    trained.train()
    assert student.training
    told = trained(INPUTS)[1]
    assert torch.equal(told, teacher.eval()(INPUTS))
    assert [each for each in trained.parameters() if each.requires_grad] == [*student.parameters()]
    combined(trained(INPUTS), torch.zeros(8, dtype=torch.long)).backward()
    assert all(each.grad is not None for each in student.parameters())
    assert all(torch.equal(held[name], each) for name, each in teacher.state_dict().items())
    assert all(each.requires_grad for each in teacher.parameters())
