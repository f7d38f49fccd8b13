from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from fedcore.seeds import derive
from server.finetune.order import Position, rows_of_epoch


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_has_the_rows_of_torchs_sampler(count: int, world: int, epoch: int) -> None:
    for rank in range(world):
        sampler: DistributedSampler[int] = DistributedSampler(
            range(count),  # type: ignore[arg-type]
            world,
            rank,
            seed=derive(5, "fine-tuning order") % 2**31,
        )
        sampler.set_epoch(epoch)
        rows = rows_of_epoch(count, Position(epoch), seed=5, rank=rank, world=world)
        assert rows.tolist() == list(sampler)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.integers(0, 8))
def test_what_is_left_is_what_follows(count: int, world: int, batch: int, steps: int) -> None:
    whole = rows_of_epoch(count, Position(), seed=5, rank=world - 1, world=world)
    taken = min(steps * batch, len(whole))
    position = Position(consumed=taken * world)
    left = rows_of_epoch(count, position, seed=5, rank=world - 1, world=world)
    assert left.tolist() == whole[taken:].tolist()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 4)])
def test_another_number_of_processes_takes_exactly_the_rows_that_are_left(
    before: int, after: int
) -> None:
    count, consumed = 48, 12
    first = [rows_of_epoch(count, Position(), seed=1, rank=r, world=before) for r in range(before)]
    position = Position(consumed=consumed)
    then = [rows_of_epoch(count, position, seed=1, rank=r, world=after) for r in range(after)]
    taken = torch.cat([rows[: consumed // before] for rows in first])
    assert sorted(torch.cat([taken, *then]).tolist()) == list(range(count))
