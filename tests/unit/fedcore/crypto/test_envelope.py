from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedcore.crypto.envelope import (
    MAX_ENVELOPE_BYTES,
    MAX_VALIDITY_S,
    SKEW_S,
    Envelope,
    Replays,
    open_envelope,
    seal_update,
    sign,
)
from fedcore.crypto.keys import new_key, public_bytes
from fedcore.errors import (
    DigestMismatch,
    SignatureInvalid,
    TrustError,
    UpdateExpired,
    UpdateForeign,
    UpdateReplayed,
    UpdateStale,
)

KEY = new_key()
NOW_S = 1_790_000_000
ENVELOPE = Envelope(
    purpose="train",
    run_id="orchard",
    round=42,
    node_id=2**64 - 17,
    base_sha256="0a" * 32,
    payload_sha256="0b" * 32,
    nonce=bytes(range(16)),
    expires_at_s=NOW_S + 600,
)
EXPECTED: dict[str, Any] = {
    "public_key": public_bytes(KEY),
    "purpose": "train",
    "run_id": "orchard",
    "round": 42,
    "node_id": 2**64 - 17,
    "base_sha256": "0a" * 32,
    "payload_sha256": "0b" * 32,
    "now_s": float(NOW_S),
}


def test_what_is_signed_is_what_is_opened() -> None:
    assert open_envelope(sign(ENVELOPE, KEY), **EXPECTED) == ENVELOPE


def test_sealing_draws_a_nonce_and_counts_from_now() -> None:
    more = {name: EXPECTED[name] for name in ("purpose", "run_id", "round", "node_id")}
    opened = [
        open_envelope(
            seal_update(
                "0b" * 32, key=KEY, base_sha256="0a" * 32, now_s=NOW_S + 0.9, validity_s=60, **more
            ),
            **EXPECTED,
        )
        for _ in range(2)
    ]
    assert opened[0].nonce != opened[1].nonce
    assert opened[0] == replace(ENVELOPE, nonce=opened[0].nonce, expires_at_s=NOW_S + 60)


@pytest.mark.parametrize(
    ("changed", "refused", "said"),
    [
        ({"run_id": "vineyard"}, UpdateForeign, "signed for run 'vineyard', expected 'orchard'"),
        ({"node_id": 17}, UpdateForeign, "signed for node 17, expected"),
        ({"purpose": "evaluate"}, UpdateForeign, "purpose 'evaluate', expected 'train'"),
        ({"round": 41}, UpdateStale, "signed for round 41, expected 42"),
        ({"round": 43}, UpdateStale, "signed for round 43, expected 42"),
        ({"base_sha256": "0c" * 32}, UpdateStale, "was trained from the model sha256:0c0c"),
        ({"payload_sha256": "0c" * 32}, DigestMismatch, "payload digest sha256:0b0b"),
        ({"expires_at_s": NOW_S - SKEW_S - 1}, UpdateExpired, "expired 601 s ago"),
        ({"expires_at_s": NOW_S + MAX_VALIDITY_S + SKEW_S + 1}, UpdateExpired, "claims to be val"),
        ({"expires_at_s": 2**64 - 1}, UpdateExpired, "claims to be valid"),
    ],
)
def test_what_belongs_elsewhere_is_refused_by_its_kind(
    changed: dict[str, Any], refused: type[TrustError], said: str
) -> None:
    with pytest.raises(refused, match=said) as caught:
        open_envelope(sign(replace(ENVELOPE, **changed), KEY), **EXPECTED)
    assert type(caught.value) is refused
    assert "not aggregated" in str(caught.value)
    assert str(caught.value).startswith("round 42: ")


def test_a_node_whose_clock_is_ten_minutes_off_is_not_locked_out() -> None:
    for expires_at_s in (NOW_S - SKEW_S, NOW_S + MAX_VALIDITY_S + SKEW_S):
        raw = sign(replace(ENVELOPE, expires_at_s=expires_at_s), KEY)
        assert open_envelope(raw, **EXPECTED).expires_at_s == expires_at_s


def test_another_key_opens_nothing() -> None:
    with pytest.raises(SignatureInvalid, match="not signed with the node's own key"):
        open_envelope(sign(ENVELOPE, new_key()), **EXPECTED)


def test_an_unsigned_claim_is_never_believed() -> None:
    """Whatever else is wrong, an envelope that nobody signed is refused for that."""
    wrong = replace(ENVELOPE, run_id="vineyard", round=1, expires_at_s=1)
    with pytest.raises(SignatureInvalid):
        open_envelope(sign(wrong, new_key()), **EXPECTED)


def test_another_protocol_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcore.crypto.envelope.VERSION", 2)
    raw = sign(ENVELOPE, KEY)
    monkeypatch.undo()
    with pytest.raises(SignatureInvalid, match=r"protocol version 2, expected 1.*same version"):
        open_envelope(raw, **EXPECTED)


@pytest.mark.parametrize(
    "changed",
    [
        {"purpose": ""},
        {"run_id": ""},
        {"run_id": "x" * 128},
        {"run_id": "é" * 64},
        {"round": -1},
        {"round": 2**64},
        {"node_id": -1},
        {"node_id": 2**64},
        {"base_sha256": "0A" * 32},
        {"base_sha256": "0a" * 31},
        {"payload_sha256": "0b" * 32 + "\n"},
        {"nonce": b""},
        {"nonce": bytes(17)},
        {"expires_at_s": -1},
    ],
    ids=str,
)
def test_what_does_not_fit_is_not_signed(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|round, node id or expiry"):
        sign(replace(ENVELOPE, **changed), KEY)


def test_the_longest_envelope_is_within_the_limit() -> None:
    longest = replace(ENVELOPE, purpose="p" * 127, run_id="r" * 127)
    raw = sign(longest, KEY)
    assert len(raw) <= MAX_ENVELOPE_BYTES
    expected = {**EXPECTED, "purpose": "p" * 127, "run_id": "r" * 127}
    assert open_envelope(raw, **expected) == longest


def test_a_node_is_counted_once_a_round() -> None:
    replays = Replays()
    replays.accept(ENVELOPE)
    with pytest.raises(UpdateReplayed, match="sent this update again"):
        replays.accept(ENVELOPE)
    with pytest.raises(UpdateReplayed, match="sent a second update"):
        replays.accept(replace(ENVELOPE, nonce=bytes(16)))
    replays.accept(replace(ENVELOPE, node_id=18))


def test_what_a_journal_recorded_counts_after_a_restart() -> None:
    replays = Replays({ENVELOPE.node_id: ENVELOPE.nonce})
    with pytest.raises(UpdateReplayed, match="sent this update again"):
        replays.accept(open_envelope(sign(ENVELOPE, KEY), **EXPECTED))
