from __future__ import annotations

from fedcore.config import Client, Privacy, RunConfig
from fedcore.owner import OPEN_POLICY, OwnerPolicy, tighten

RUN = RunConfig(
    name="x",
    task="t.py",
    privacy=Privacy(unit="example", max_epsilon=4.0, target_delta=1e-4),
    client=Client(epochs=3, device="auto"),
)


def test_an_owner_who_asks_for_nothing_changes_nothing() -> None:
    assert tighten(RUN, OPEN_POLICY) == RUN


def test_a_stricter_owner_has_the_last_word() -> None:
    done = tighten(RUN, OwnerPolicy(max_epsilon=1.0, target_delta=1e-6, device="cpu"))
    assert (done.privacy.max_epsilon, done.privacy.target_delta) == (1.0, 1e-6)
    assert done.client.device == "cpu"
    assert done.client.epochs == 3


def test_a_looser_owner_does_not_loosen_what_the_server_asked() -> None:
    done = tighten(RUN, OwnerPolicy(max_epsilon=100.0, target_delta=0.1))
    assert done.privacy == RUN.privacy
