from __future__ import annotations

import random

from fedcore.flower.fleet_pending import PendingMessage, PendingMessages


def test_what_is_found_by_each_key_is_what_was_added_and_not_popped() -> None:
    rng, there, expected = random.Random(1), PendingMessages(), dict[str, PendingMessage]()
    for step in range(3000):
        if expected and rng.random() < 0.45:
            message_id = rng.choice(sorted(expected))
            assert there.pop(message_id) is expected.pop(message_id)
        else:
            objects = frozenset(f"object {rng.randrange(20)}" for _ in range(3))
            pending = PendingMessage(rng.randrange(5), objects, 1)
            expected[f"message {step}"] = pending
            there.add(f"message {step}", pending)
        node, thing = rng.randrange(5), f"object {rng.randrange(20)}"
        its = [(key, one) for key, one in expected.items() if one.node_id == node]
        assert there.of(node) == its
        assert there.sends(thing) == any(thing in one.objects for one in expected.values())
        assert list(there) == list(expected)
    assert there.pop("message") is None
    for message_id in list(there):
        there.pop(message_id)
    assert (there._of, there._objects) == ({}, {}), "nothing is kept of what was answered"
