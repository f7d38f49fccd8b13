"""Thousands of envelopes that are not what they claim: none is accepted, each has its type."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from fedcore.crypto.envelope import MAX_ENVELOPE_BYTES, Envelope, Replays, open_envelope, sign
from fedcore.crypto.keys import new_key, public_bytes
from fedcore.errors import (
    CertificateRefused,
    DigestMismatch,
    SignatureInvalid,
    TrustError,
    UpdateForeign,
    UpdateReplayed,
    UpdateStale,
)

KEY, OTHER = new_key(), new_key()
NOW_S = 1_790_000_000
ORDER = int(  # of P-384's base point, as SEC 2 (version 2, 2.5.1) prints it
    "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF"
    "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973",
    16,
)
TRUE = Envelope("train", "orchard", 7, 1001, "0a" * 32, "0b" * 32, bytes(range(16)), NOW_S + 60)
RAW = sign(TRUE, KEY)
BODY, SIGNATURE = RAW[2:-96], RAW[-96:]


def accepted(raw: bytes, **changed: Any) -> Envelope:
    expected: dict[str, Any] = {
        "public_key": public_bytes(KEY),
        "purpose": "train",
        "run_id": "orchard",
        "round": 7,
        "node_id": 1001,
        "base_sha256": "0a" * 32,
        "payload_sha256": "0b" * 32,
        "now_s": float(NOW_S),
    }
    return open_envelope(raw, **{**expected, **changed})


def refusal(raw: bytes, **changed: Any) -> type[TrustError]:
    try:
        accepted(raw, **changed)
    except TrustError as error:
        return type(error)
    pytest.fail(f"accepted: {raw.hex()}")


def test_the_true_one_is_accepted() -> None:
    assert accepted(RAW) == TRUE


def test_every_bit_counts() -> None:
    kinds = Counter(
        refusal(RAW[:place] + bytes((RAW[place] ^ 1 << bit,)) + RAW[place + 1 :])
        for place in range(len(RAW))
        for bit in range(8)
    )
    assert kinds == {SignatureInvalid: 8 * len(RAW)}
    assert kinds.total() > 1000


def test_every_length_counts() -> None:
    kinds = Counter(refusal(RAW[:end]) for end in range(len(RAW)))
    kinds.update(refusal(RAW + bytes(more)) for more in range(1, 600))
    assert set(kinds) == {SignatureInvalid}


def test_random_splices_of_true_envelopes_are_refused() -> None:
    rng = random.Random(20)
    others = [
        sign(replace(TRUE, round=number, nonce=rng.randbytes(16)), KEY) for number in range(9)
    ]
    kinds: Counter[type[TrustError]] = Counter()
    for _ in range(1300):
        first, second = rng.sample(others, 2)
        cut = rng.randrange(1, len(RAW) - 1)
        spliced = first[:cut] + second[cut:]
        if spliced not in others:
            kinds[refusal(spliced)] += 1
    assert kinds.total() >= 1000
    assert set(kinds) == {SignatureInvalid}


def test_the_other_signature_of_the_same_body_is_refused() -> None:
    """(r, n - s) verifies wherever (r, s) does; taking it would make a second envelope of one."""
    r, s = SIGNATURE[:48], int.from_bytes(SIGNATURE[48:], "big")
    twin = RAW[:-96] + r + (ORDER - s).to_bytes(48, "big")
    assert refusal(twin) is SignatureInvalid


@pytest.mark.parametrize("s", [0, 1, ORDER - 1, ORDER, 2**384 - 1])
@pytest.mark.parametrize("r", [0, 1, ORDER - 1, ORDER, 2**384 - 1])
def test_degenerate_signatures_are_refused(r: int, s: int) -> None:
    forged = RAW[:-96] + r.to_bytes(48, "big") + s.to_bytes(48, "big")
    assert refusal(forged) is SignatureInvalid


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (BODY, SHA384()),
        (RAW[:-96], SHA384()),
        (b"fedcore update envelope\x00" + BODY, SHA256()),
        (b"another purpose\x00" + BODY, SHA384()),
    ],
    ids=["no domain", "with its length", "another digest", "another domain"],
)
def test_a_signature_that_the_key_made_for_something_else_is_refused(
    message: bytes, digest: SHA256 | SHA384
) -> None:
    """As Flower's own authentication, TLS and signing requests use the same key."""
    r, s = decode_dss_signature(KEY.sign(message, ECDSA(digest)))
    s = min(s, ORDER - s)
    assert refusal(RAW[:-96] + r.to_bytes(48, "big") + s.to_bytes(48, "big")) is SignatureInvalid


def test_one_nodes_envelope_is_not_anothers() -> None:
    theirs = sign(replace(TRUE, node_id=1002), OTHER)
    assert refusal(theirs) is SignatureInvalid  # pushed under 1001's name
    assert refusal(RAW, public_key=public_bytes(OTHER), node_id=1002) is SignatureInvalid
    own_key_foreign_claim = sign(replace(TRUE, node_id=1001), OTHER)
    assert refusal(own_key_foreign_claim, public_key=public_bytes(OTHER), node_id=1002) is (
        UpdateForeign
    )


def test_a_true_envelope_fits_nowhere_else() -> None:
    for changed, expected in (
        ({"round": 8}, UpdateStale),
        ({"base_sha256": "0c" * 32}, UpdateStale),
        ({"run_id": "orchard2"}, UpdateForeign),
        ({"purpose": "evaluate"}, UpdateForeign),
        ({"payload_sha256": "0c" * 32}, DigestMismatch),
    ):
        assert refusal(RAW, **changed) is expected


def test_a_key_that_is_no_identity_opens_nothing() -> None:
    assert refusal(RAW, public_key=b"garbage") is CertificateRefused


def test_what_is_too_long_is_not_parsed() -> None:
    assert refusal(b"\x01" * (MAX_ENVELOPE_BYTES + 1)) is SignatureInvalid
    assert refusal(RAW + bytes(100 << 20)) is SignatureInvalid


def test_of_many_at_once_one_counts() -> None:
    replays, counted, refused = Replays(), [], []
    barrier = threading.Barrier(8)

    def push(number: int) -> None:
        envelope = replace(TRUE, nonce=bytes([number % 2] * 16))
        barrier.wait(timeout=10)
        try:
            replays.accept(envelope)
            counted.append(number)
        except UpdateReplayed as error:
            refused.append(str(error))

    threads = [threading.Thread(target=push, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(counted) == 1
    assert len(refused) == 7
