from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto.envelope import MAX_VALIDITY_S, Envelope, open_envelope, sign
from fedcore.crypto.keys import new_key, public_bytes
from fedcore.errors import TrustError

KEY, OTHER = new_key(), new_key()
U64 = st.integers(0, 2**64 - 1)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
TEXTS = st.text(min_size=1, max_size=31)
ENVELOPES = st.builds(
    Envelope,
    purpose=TEXTS,
    run_id=TEXTS,
    round=U64,
    node_id=U64,
    base_sha256=DIGESTS,
    payload_sha256=DIGESTS,
    nonce=st.binary(min_size=16, max_size=16),
    expires_at_s=U64,
)


def opened(raw: bytes, envelope: Envelope, **changed: Any) -> Envelope:
    expected = {name: getattr(envelope, name) for name in ("purpose", "run_id", "round", "node_id")}
    return open_envelope(
        raw,
        **{
            "public_key": public_bytes(KEY),
            **expected,
            "base_sha256": envelope.base_sha256,
            "payload_sha256": envelope.payload_sha256,
            "now_s": envelope.expires_at_s - 60.0,
            **changed,
        },
    )


@given(ENVELOPES)
def test_every_envelope_comes_back(envelope: Envelope) -> None:
    assert opened(sign(envelope, KEY), envelope) == envelope


@given(ENVELOPES, ENVELOPES)
def test_two_envelopes_never_have_one_body(first: Envelope, second: Envelope) -> None:
    """The signature covers a body, so what differs must differ there."""
    bodies = [sign(envelope, KEY)[:-96] for envelope in (first, second)]
    assert (bodies[0] == bodies[1]) == (first == second)


@given(TEXTS, TEXTS)
def test_texts_cannot_run_into_each_other(first: str, second: str) -> None:
    base = Envelope(first, second, 1, 1, "0" * 64, "0" * 64, bytes(16), 1)
    joined = Envelope(first + second[:1], second[1:] or "x", 1, 1, "0" * 64, "0" * 64, bytes(16), 1)
    assert sign(base, KEY)[:-96] != sign(joined, KEY)[:-96]


@given(ENVELOPES, st.data())
@settings(max_examples=300)
def test_no_changed_byte_is_accepted(envelope: Envelope, data: st.DataObject) -> None:
    raw = bytearray(sign(envelope, KEY))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TrustError):
        opened(bytes(raw), envelope)


@given(st.binary(max_size=600), ENVELOPES)
def test_garbage_is_refused_with_a_type(raw: bytes, envelope: Envelope) -> None:
    with pytest.raises(TrustError):
        opened(raw, envelope)


@given(ENVELOPES, st.floats(-1e9, 1e9))
def test_time_is_counted_from_expiry_alone(envelope: Envelope, left_s: float) -> None:
    now_s = envelope.expires_at_s - left_s
    left_s = envelope.expires_at_s - now_s  # as floats have it, far from 1970
    if -600 <= left_s <= MAX_VALIDITY_S + 600:
        assert opened(sign(envelope, KEY), envelope, now_s=now_s) == envelope
    else:
        with pytest.raises(TrustError, match=r"expired .* s ago|claims to be valid"):
            opened(sign(envelope, KEY), envelope, now_s=now_s)
