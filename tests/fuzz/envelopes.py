"""Envelopes: the signature around an update, of a node that signs whatever it likes."""

from __future__ import annotations

from functools import cache
from random import Random

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from fedcore.crypto import envelope
from fedcore.crypto.keys import public_bytes
from tests.fuzz.mutate import TEXTS, damaged
from tests.fuzz.project import member_keys

NOW_S = 1_800_000_000.0
_DIGEST = "ab" * 32
_TIMES = (0, 1, int(NOW_S) - 700, int(NOW_S) + 60, int(NOW_S) + 60, 2**63, 2**64 - 1)


@cache
def _honest() -> bytes:
    return envelope.seal_update(
        _DIGEST,
        key=member_keys()[0],
        purpose="train",
        run_id="c" * 64,
        round=3,
        node_id=7,
        base_sha256=_DIGEST,
        now_s=NOW_S,
        validity_s=60,
    )


def make(rng: Random) -> bytes:
    """An envelope that is properly signed over an odd body, or whose bytes were changed."""
    if rng.randrange(3) == 0:
        return damaged(rng, _honest())
    texts = [b"train", b"c" * 64]
    if rng.randrange(3) == 0:
        odd = rng.choice(TEXTS).encode(errors="surrogatepass")[:127]
        texts[rng.randrange(2)] = rng.choice((odd, b"\xff\xfe", b"evaluate", b"x" * 127))
    numbers = [3, 7, rng.choice(_TIMES)]
    if rng.randrange(3) == 0:
        numbers[rng.randrange(2)] = rng.choice((0, 1, 2**63, 2**64 - 1))
    digests = [rng.choice((bytes.fromhex(_DIGEST),) * 3 + (b"\0" * 32,)) for _ in range(2)]
    fixed = envelope._FIXED.pack(*numbers[:2], *digests, b"n" * 16, numbers[2])
    body = bytes((rng.choice((1, 1, 1, 1, 1, 0, 2, 255)),))
    body += b"".join(bytes((len(text),)) + text for text in texts) + fixed
    if rng.randrange(4) == 0:
        body = damaged(rng, body)[:500]
    key = member_keys()[0 if rng.randrange(8) else 1]
    r, s = decode_dss_signature(key.sign(envelope._DOMAIN + body, ECDSA(SHA384())))
    s = min(s, envelope._ORDER - s) if rng.randrange(10) else envelope._ORDER - s
    raw = len(body).to_bytes(2, "big") + body + r.to_bytes(48, "big") + s.to_bytes(48, "big")
    return raw if rng.randrange(20) else damaged(rng, raw)


def read(raw: bytes) -> None:
    """As a server opens it."""
    found = envelope.open_envelope(
        raw,
        public_key=public_bytes(member_keys()[0]),
        purpose="train",
        run_id="c" * 64,
        round=3,
        node_id=7,
        base_sha256=_DIGEST,
        payload_sha256=_DIGEST,
        now_s=NOW_S,
    )
    assert (found.round, found.node_id, found.purpose) == (3, 7, "train")
