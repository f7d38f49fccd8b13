"""Signs a client's reply and verifies it: the signature covers the content and the request.

A reply carries its signature in a record of its own. `verify_reply` adds to the record who made it
and when it was verified; `signature_of` reads a verified signature back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedcore.crypto.envelope import Envelope, open_envelope, seal_update
from fedcore.crypto.keys import fingerprint
from fedcore.errors import SignatureInvalid
from fedcore.files import sha256_hex
from fedcore.rpc.hello import INSTANCE, SETTINGS
from fedcore.updates.messages import ARRAYS, CONFIG, ENVELOPE
from fedcore.updates.piece_digests import cuts_of
from fedcore.updates.pieces import size_of

_SIGNER, _VERIFIED_AT = "signer", "verified-at-s"
VALIDITY_S = 24 * 3600
"""Seconds that a reply may take to arrive."""


@dataclass(frozen=True)
class ReplySignature:
    """A verified signature of a reply: proves which key sent which content, for which request."""

    envelope: bytes
    """The signed description of the reply with its signature, see `fedcore.crypto.envelope`."""
    signer: str
    """Fingerprint of the key that made it, see `fedcore.crypto.keys.fingerprint`."""
    verified_at_s: float
    """When the server verified it, by the server's clock: seconds since 1970 (UTC)."""


def run_digest(settings: Mapping[str, str]) -> str:
    """Returns the run's identity in signatures; it differs for other settings and each new start.

    Args:
        settings: The settings that the server sends to devices.
    """
    return sha256_hex(f"{settings.get(INSTANCE)} {settings.get(SETTINGS, '')}".encode())


def round_of(instruction: RecordDict) -> int:
    """Returns the round of an instruction; 0 if it belongs to none."""
    config = instruction.get(CONFIG)
    number = config.get("server-round", 0) if isinstance(config, ConfigRecord) else 0
    return number if isinstance(number, int) and number > 0 else 0


def base_digest(instruction: RecordDict) -> str:
    """Returns a digest over the bytes of the weights in an instruction."""
    return content_digest(
        RecordDict({ARRAYS: instruction[ARRAYS]} if ARRAYS in instruction else {})
    )


def content_digest(content: RecordDict) -> str:
    """Returns the SHA-256 over every record except the signature, in hexadecimal.

    Arrays enter by the digests of their cuts. Each part is preceded by its length, and those
    digests by the number of bytes, so that different contents never give the same input.
    """
    digest = hashlib.sha256()

    def feed(parts: Iterable[str | bytes]) -> None:
        for part in parts:
            raw = part.encode() if isinstance(part, str) else part
            digest.update(len(raw).to_bytes(8, "big"))
            digest.update(raw)

    for name in sorted(content):
        record = content[name]
        if name == ENVELOPE:
            continue
        feed((type(record).__name__, name, str(len(record))))
        for key in sorted(record):
            value = record[key]
            if isinstance(record, ArrayRecord):
                array = record[key]
                feed((key, array.dtype, repr(tuple(array.shape)), array.stype))
                digest.update(size_of(array).to_bytes(8, "big"))
                for cut in cuts_of(array):
                    digest.update(bytes.fromhex(cut))
            else:
                feed((key, _text(value)))
    return digest.hexdigest()


def _text(value: object) -> str:
    """Returns a metric or setting as text that is identical on both sides of the network."""
    if isinstance(value, list):
        return f"list {' '.join(map(_text, value))}"
    if isinstance(value, float):
        return f"float {float(value)!r}"  # NumPy's type has another name
    return f"{type(value).__name__} {value!r}"


def sign_reply(
    content: RecordDict,
    instruction: RecordDict,
    *,
    purpose: str,
    run_id: str,
    node_id: int,
    key: EllipticCurvePrivateKey,
    now_s: float,
) -> None:
    """Signs a reply with a fresh nonce, and adds the signature as a record.

    Args:
        content: The reply.
        instruction: The instruction that it answers.
        purpose: The instruction's message type.
        run_id: The result of `run_digest`.
        node_id: The replying node.
        key: That node's private key.
        now_s: The node's clock, seconds since 1970 (UTC).
    """
    raw = seal_update(
        content_digest(content),
        key=key,
        purpose=purpose,
        run_id=run_id,
        round=round_of(instruction),
        node_id=node_id,
        base_sha256=base_digest(instruction),
        now_s=now_s,
        validity_s=VALIDITY_S,
    )
    content[ENVELOPE] = ConfigRecord({ENVELOPE: raw})


def verify_reply(
    content: RecordDict,
    *,
    purpose: str,
    run_id: str,
    round: int,
    node_id: int,
    base_sha256: str,
    public_key: bytes,
    now_s: float,
) -> Envelope:
    """Verifies a reply's signature and returns what it describes.

    Adds the signer and ``now_s`` to the signature's record, for `signature_of`, and removes
    everything else that the sender put there.

    Raises:
        SignatureInvalid: it is missing, malformed or made with another key.
        TrustError: it is for another request, or too old; see `open_envelope`.
    """
    record = content.get(ENVELOPE)
    raw = record.get(ENVELOPE) if isinstance(record, ConfigRecord) else None
    if not isinstance(raw, bytes):
        raise SignatureInvalid(
            f"round {round}: the update of node {node_id} is not signed. It was not aggregated; "
            "a node must sign each update with the key in its kit."
        )
    envelope = open_envelope(
        raw,
        public_key=public_key,
        purpose=purpose,
        run_id=run_id,
        round=round,
        node_id=node_id,
        base_sha256=base_sha256,
        payload_sha256=content_digest(content),
        now_s=now_s,
    )
    content[ENVELOPE] = ConfigRecord(
        {ENVELOPE: raw, _SIGNER: bytes.fromhex(fingerprint(public_key)), _VERIFIED_AT: float(now_s)}
    )
    return envelope


def signature_of(content: RecordDict, *, where: str) -> ReplySignature:
    """Returns the signature that `verify_reply` has verified.

    Args:
        content: The reply.
        where: The reply, for the error.

    Raises:
        SignatureInvalid: the reply has no verified signature.
    """
    record = content.get(ENVELOPE)
    found = record if isinstance(record, ConfigRecord) else ConfigRecord()
    match found.get(ENVELOPE), found.get(_SIGNER), found.get(_VERIFIED_AT):
        case bytes(raw), bytes(signer), float(verified_at_s):
            return ReplySignature(raw, signer.hex(), verified_at_s)
    raise SignatureInvalid(
        f"{where}: it has no verified signature. It was not accepted, since the journal proves who "
        "sent each update; a server verifies replies before it keeps them."
    )
