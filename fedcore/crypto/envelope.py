"""Signed envelopes of updates: bind an update to its node, run, round, purpose and base model.

::

    body       version u8 | purpose | run_id | round u64 | node_id u64 | base 32 | payload 32
               | nonce 16 | expires_at_s u64        text: length u8, then so many bytes of UTF-8
    envelope   length of body u16 | body | signature r 48 | s 48          integers big-endian

The signature is ECDSA on P-384 with SHA-384 over a domain tag and the body. Each value has only one
encoding, and of the two valid signatures (r, s) and (r, n - s) only the smaller one is accepted:
changing any bit makes an envelope invalid. A node calls `seal_update`, the server `open_envelope`.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA384

from fedcore.crypto.keys import parse_public
from fedcore.errors import (
    DigestMismatch,
    SignatureInvalid,
    UpdateExpired,
    UpdateForeign,
    UpdateReplayed,
    UpdateStale,
)

VERSION = 1
MAX_ENVELOPE_BYTES = 512  # bytes: with the longest texts it has 2 + 108 + 2 * 128 + 96
MAX_TEXT_BYTES = 127  # bytes of a purpose or a run id
NONCE_BYTES = 16
SKEW_S = 600
"""Tolerated error of a device's clock, either way, in seconds."""
MAX_VALIDITY_S = 7 * 24 * 3600
"""Longest validity that a device may give its update, by the server's clock plus `SKEW_S`."""

_DOMAIN = b"fedcore update envelope\x00"
_ORDER = int(  # of the base point of P-384 (FIPS 186-4, D.1.2.4)
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
    "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)
_SCALAR_BYTES = 48
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIXED = struct.Struct(">QQ32s32s16sQ")
_NOT_COUNTED = "The update was not aggregated"


@dataclass(frozen=True)
class Envelope:
    """The signed description of an update."""

    purpose: str
    """The kind of request answered, such as ``train``; a reply to one is invalid for another."""
    run_id: str
    round: int
    node_id: int
    """Flower's node id, below 2^64."""
    base_sha256: str
    """Digest of the global model that training started from, in hexadecimal."""
    payload_sha256: str
    """Digest of the payload's bytes, in hexadecimal."""
    nonce: bytes
    """16 random bytes, new for each signature."""
    expires_at_s: int
    """Seconds since 1970 (UTC), by the node's clock."""


def seal_update(
    payload_sha256: str,
    *,
    key: EllipticCurvePrivateKey,
    purpose: str,
    run_id: str,
    round: int,
    node_id: int,
    base_sha256: str,
    now_s: float,
    validity_s: int,
) -> bytes:
    """Returns a signed envelope with a fresh nonce, valid for ``validity_s`` from ``now_s``."""
    return sign(
        Envelope(
            purpose=purpose,
            run_id=run_id,
            round=round,
            node_id=node_id,
            base_sha256=base_sha256,
            payload_sha256=payload_sha256,
            nonce=os.urandom(NONCE_BYTES),
            expires_at_s=int(now_s) + validity_s,
        ),
        key,
    )


def sign(envelope: Envelope, key: EllipticCurvePrivateKey) -> bytes:
    """Returns the envelope as bytes, with its signature.

    Raises:
        ValueError: a field does not fit the format.
    """
    body = _encode(envelope)
    r, s = decode_dss_signature(key.sign(_DOMAIN + body, ECDSA(SHA384())))
    s = min(s, _ORDER - s)
    return b"".join(
        (
            len(body).to_bytes(2, "big"),
            body,
            r.to_bytes(_SCALAR_BYTES, "big"),
            s.to_bytes(_SCALAR_BYTES, "big"),
        )
    )


def open_envelope(
    raw: bytes,
    *,
    public_key: bytes,
    purpose: str,
    run_id: str,
    round: int,
    node_id: int,
    base_sha256: str,
    payload_sha256: str,
    now_s: float,
) -> Envelope:
    """Verifies an envelope and returns it, if this node signed it for exactly these values.

    The signature is verified before any field is used. `Replays` detects an envelope that was sent
    before.

    Args:
        raw: The received bytes.
        public_key: The sender's registered key, from `fedcore.crypto.keys.public_bytes`.
        purpose: The kind of request that the server sent.
        run_id: The current run.
        round: The current round.
        node_id: The sender's node id.
        base_sha256: Digest of the global model that the round started from.
        payload_sha256: Digest of the payload, computed by the server from the received bytes.
        now_s: The server's clock, seconds since 1970 (UTC).

    Raises:
        SignatureInvalid: the envelope is malformed, or this key did not sign it.
        UpdateForeign: it is of another run, node or purpose.
        UpdateStale: it is of another round, or from another base model.
        DigestMismatch: it covers another payload.
        UpdateExpired: it expired more than `SKEW_S` ago, or its validity is too long.
    """
    envelope = read_envelope(raw, public_key, where=f"round {round}: node {node_id}")
    where = f"round {round}: refused update from node {node_id}"
    for what, got, expected in (
        ("run", envelope.run_id, run_id),
        ("node", envelope.node_id, node_id),
        ("purpose", envelope.purpose, purpose),
    ):
        if got != expected:
            raise UpdateForeign(
                f"{where}: the envelope is signed for {what} {got!r}, expected {expected!r}. "
                f"{_NOT_COUNTED}; a node may only send its own reply to the request that it "
                "received."
            )
    if envelope.round != round:
        raise UpdateStale(
            f"{where}: the envelope is signed for round {envelope.round}, expected {round}. "
            f"{_NOT_COUNTED}; the node waits for its next instruction."
        )
    if envelope.base_sha256 != base_sha256:
        raise UpdateStale(
            f"{where}: it was trained from the model sha256:{envelope.base_sha256[:16]}.., but "
            f"the round started from sha256:{base_sha256[:16]}... {_NOT_COUNTED}; the node must "
            "train from the model sent with its instruction."
        )
    if envelope.payload_sha256 != payload_sha256:
        raise DigestMismatch(
            f"{where}: payload digest sha256:{payload_sha256[:16]}.. does not match signed digest "
            f"sha256:{envelope.payload_sha256[:16]}... {_NOT_COUNTED}; the node may resend within "
            "this round."
        )
    left_s = envelope.expires_at_s - now_s
    if left_s < -SKEW_S:
        raise UpdateExpired(
            f"{where}: it expired {-left_s:.0f} s ago, more than the {SKEW_S} s allowed for "
            f"clock skew. {_NOT_COUNTED}; check that the node's clock is right."
        )
    if left_s > MAX_VALIDITY_S + SKEW_S:
        raise UpdateExpired(
            f"{where}: it claims to be valid for {left_s:.0f} s more, expected at most "
            f"{MAX_VALIDITY_S} s. {_NOT_COUNTED}; check that the node's clock is right."
        )
    return envelope


class Replays:
    """Detects a node's second update in one round; memory is proportional to one round's nodes.

    Make one for each run, round and purpose: `open_envelope` rejects envelopes of others. Safe for
    use from several threads.
    """

    def __init__(self, seen: Mapping[int, bytes] | None = None) -> None:
        """Starts with the nonces by node that a journal recorded before a restart."""
        self._nonces = dict(seen or {})
        self._lock = threading.Lock()

    def accept(self, envelope: Envelope) -> None:
        """Records that the envelope's node has sent its update.

        Raises:
            UpdateReplayed: the node has already sent this update or another; the first one stays.
        """
        with self._lock:
            first = self._nonces.get(envelope.node_id)
            if first is None:
                self._nonces[envelope.node_id] = envelope.nonce
                return
        what = "this update again" if first == envelope.nonce else "a second update"
        raise UpdateReplayed(
            f"round {envelope.round}: node {envelope.node_id} sent {what}. It was not aggregated "
            "again; the first one counts, and the node has nothing more to send."
        )


def _encode(envelope: Envelope) -> bytes:
    for digest in (envelope.base_sha256, envelope.payload_sha256):
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"digest {digest!r}: expected 64 hexadecimal digits, lower case")
    if len(envelope.nonce) != NONCE_BYTES:
        raise ValueError(f"nonce: expected {NONCE_BYTES} bytes, got {len(envelope.nonce)}")
    texts = b""
    for text in (envelope.purpose, envelope.run_id):
        raw = text.encode()
        if not 1 <= len(raw) <= MAX_TEXT_BYTES:
            raise ValueError(f"{text!r}: expected 1 to {MAX_TEXT_BYTES} bytes, got {len(raw)}")
        texts += bytes((len(raw),)) + raw
    try:
        fixed = _FIXED.pack(
            envelope.round,
            envelope.node_id,
            bytes.fromhex(envelope.base_sha256),
            bytes.fromhex(envelope.payload_sha256),
            envelope.nonce,
            envelope.expires_at_s,
        )
    except struct.error as error:
        raise ValueError(f"round, node id or expiry: {error}") from None
    return bytes((VERSION,)) + texts + fixed


def read_envelope(raw: bytes, public_key: bytes, *, where: str) -> Envelope:
    """Returns an envelope after verifying its encoding and signature, and nothing else.

    Raises:
        SignatureInvalid: the envelope is malformed, or this key did not sign it.
    """
    body, r, s = _split(raw, where)
    key = parse_public(public_key)
    try:
        if not (0 < r < _ORDER and 0 < s <= _ORDER // 2):
            raise InvalidSignature
        key.verify(encode_dss_signature(r, s), _DOMAIN + body, ECDSA(SHA384()))
    except InvalidSignature:
        raise SignatureInvalid(
            f"{where}: the update's envelope is not signed with the node's own key. "
            f"{_NOT_COUNTED}; a node must sign with the key in its kit."
        ) from None
    return _decode(body, where)


def _split(raw: bytes, where: str) -> tuple[bytes, int, int]:
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise SignatureInvalid(
            f"{where}: the update's envelope has {len(raw)} bytes, expected at most "
            f"{MAX_ENVELOPE_BYTES}. It was not parsed, and the update was not aggregated."
        )
    end = 2 + int.from_bytes(raw[:2], "big")
    if len(raw) != end + 2 * _SCALAR_BYTES:
        raise _malformed(where, f"{len(raw)} bytes do not match the length that it states")
    r, s = raw[end : end + _SCALAR_BYTES], raw[end + _SCALAR_BYTES :]
    return raw[2:end], int.from_bytes(r, "big"), int.from_bytes(s, "big")


def _decode(body: bytes, where: str) -> Envelope:
    """Parses a verified body; the error for another protocol version names the version."""
    if body[:1] != bytes((VERSION,)):
        got = body[0] if body else "none"
        raise SignatureInvalid(
            f"{where}: the update's envelope has protocol version {got}, expected {VERSION}. "
            f"{_NOT_COUNTED}; install the same version of fedcore on both sides."
        )
    try:
        purpose, rest = _text(body[1:])
        run_id, rest = _text(rest)
        number, node_id, base, payload, nonce, expires_at_s = _FIXED.unpack(rest)
    except (ValueError, struct.error) as error:
        raise _malformed(where, str(error)) from None
    return Envelope(
        purpose, run_id, number, node_id, base.hex(), payload.hex(), nonce, expires_at_s
    )


def _text(raw: bytes) -> tuple[str, bytes]:
    length = raw[0] if raw else 0
    if not 1 <= length <= MAX_TEXT_BYTES or len(raw) <= length:
        raise ValueError("a text field has no length, or a length past the end of the envelope")
    return raw[1 : 1 + length].decode(), raw[1 + length :]


def _malformed(where: str, why: str) -> SignatureInvalid:
    return SignatureInvalid(
        f"{where}: the update's envelope is malformed: {why}. {_NOT_COUNTED}; expected the "
        "format of `fedcore.crypto.envelope`: install the same version of fedcore on both sides."
    )
