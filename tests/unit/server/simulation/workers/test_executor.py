from __future__ import annotations

import pytest
from flwr.app import RecordDict

from server.simulation.virtual.state import Method
from server.simulation.workers.executor import pieces
from server.simulation.workers.messages import ClientRef, RoundTask


def sizes(method: Method, clients: int, workers: int) -> list[int]:
    asked = [ClientRef(node, str(node), None) for node in range(clients)]
    found = list(pieces(RoundTask("train", RecordDict(), method=method), asked, workers))
    assert [one for piece in found for one in piece] == asked
    return [len(piece) for piece in found]


@pytest.mark.parametrize("clients", [1, 2, 7, 50, 500])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_pieces_become_smaller_until_a_client_at_a_time(clients: int, workers: int) -> None:
    found = sizes("loop", clients, workers)
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1
    assert found[0] <= -(-clients // workers)


def test_side_by_side_every_worker_has_one() -> None:
    assert sizes("vectorised", 50, 2) == [25, 25]
    assert sizes("vectorised", 7, 2) == [4, 3]
    assert sizes("vectorised", 1, 2) == [1]


def test_nobody_asked_is_nothing_to_do() -> None:
    assert sizes("loop", 0, 2) == []
