from __future__ import annotations

import pytest
import torch
from torch import nn

from fedcore.config import Client, Privacy
from fedcore.errors import InsufficientMemory
from fedcore.training.memory import check_memory, free_bytes, memory_errors, needed_bytes

MODEL = nn.Linear(999, 1)  # 1,000 parameters, 4,000 bytes
PLAIN, PRIVATE = Privacy(), Privacy(unit="example")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("client", "privacy", "copies"),
    [
        (Client(), PLAIN, 1),
        (Client(momentum=0.9), PLAIN, 2),
        (Client(optimizer="adam"), PLAIN, 3),
        (Client(batch_size=20), PRIVATE, 21),
        (Client(batch_size=20, optimizer="adam"), PRIVATE, 23),
        (Client(batch_size=500), PRIVATE, 101),  # no batch is larger than the client's data
    ],
)
def test_gradients_the_optimisers_state_and_per_example_gradients_are_counted(
    client: Client, privacy: Privacy, copies: int
) -> None:
    assert needed_bytes(MODEL, client, privacy, examples=100) == copies * 4000


def test_frozen_parameters_take_no_gradients() -> None:
    model = nn.Linear(999, 1)
    model.weight.requires_grad_(False)
    assert needed_bytes(model, Client(), PLAIN, examples=10) == 4


def test_training_that_fits_passes() -> None:
    check_memory(MODEL, Client(), PLAIN, CPU, examples=10, owner_limit_bytes=4000)
    check_memory(MODEL, Client(), PLAIN, CPU, examples=10, owner_limit_bytes=None)


@pytest.mark.parametrize(
    ("privacy", "said"),
    [(PLAIN, "make the model smaller"), (PRIVATE, "make client.batch_size smaller")],
    ids=["plain", "private"],
)
def test_more_than_the_owner_allows_is_refused_with_both_figures(
    privacy: Privacy, said: str
) -> None:
    with pytest.raises(InsufficientMemory) as caught:
        check_memory(
            nn.Linear(999_999, 1), Client(), privacy, CPU, examples=1, owner_limit_bytes=3_999_999
        )
    figures = "4,000,000" if privacy is PLAIN else "8,000,000"
    assert f"needs at least {figures} bytes and the owner's limit is 3,999,999 bytes" in str(
        caught.value
    )
    assert said in str(caught.value)


def test_more_than_is_free_is_refused_before_it_is_asked_for() -> None:
    with torch.device("meta"):  # a hundred terabytes that exist on paper alone
        huge = nn.Linear(1_000_000, 25_000_000)
    with pytest.raises(InsufficientMemory, match=r"free on cpu is .* Nothing was trained"):
        check_memory(huge, Client(), PLAIN, CPU, examples=10, owner_limit_bytes=None)


def test_the_system_tells_what_is_free() -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert 1 << 20 < free < 1 << 50


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_an_allocation_that_fails_says_what_to_make_smaller(error: Exception) -> None:
    with (
        pytest.raises(InsufficientMemory, match=r"round 3: training: memory ran out .*batch_size"),
        memory_errors("round 3: training"),
    ):
        raise error


def test_an_allocation_of_torch_that_fails_is_recognised() -> None:
    with pytest.raises(InsufficientMemory, match="memory ran out"), memory_errors("training"):
        torch.empty(1 << 60)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("training"):
        raise RuntimeError("shapes do not fit")
