"""A ledger for an auditor: every charge and what they come to, under the device's signature.

The signature says that this device wrote it, not that the device told everything; what the charges
come to, whoever holds the file can compute again.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA384
from pydantic import Field, ValidationError

from edge_client.ledger.book import Spent
from edge_client.ledger.view import Found, View
from fedcore.config.run import Fraction, Section
from fedcore.crypto.keys import MAX_KEY_BYTES, fingerprint, parse_public, public_bytes
from fedcore.errors import CertificateRefused, PrivacyError, SignatureInvalid
from fedcore.privacy.accounting import Accountant, epsilon_of

MAX_EXPORT_BYTES = 128 << 20
_DOMAIN = b"fedcore ledger export\x00"
_TOLERANCE = 1e-6
"""By so much, relative, may a recomputed epsilon differ: other machines round otherwise."""


class _Composed(Section):
    """What charges come to."""

    target_delta: Fraction
    epsilon: Annotated[float, Field(ge=0)]


class Exported(Section):
    """What is signed."""

    format: Literal["fedcore.ledger-export/1"] = "fedcore.ledger-export/1"
    made_at: str
    """By the device's clock, ISO 8601 in UTC."""
    accountant: Accountant
    runs: dict[str, tuple[Spent, ...]]
    composed: dict[str, _Composed]
    """By run."""
    device: _Composed
    """Over all runs."""
    max_epsilon: float | None
    """What the owner allows the device; None without a limit."""
    problems: tuple[str, ...]
    """What is wrong with the files that this was read from."""


class _File(Section):
    """The file: what was exported, the key in PEM, and its signature in base 64."""

    ledger: Exported
    key: Annotated[str, Field(max_length=MAX_KEY_BYTES)] = ""
    signature: Annotated[str, Field(max_length=1024)] = ""


@dataclass(frozen=True)
class Checked:
    """An export that holds what it says."""

    ledger: Exported
    signer: str
    """The SHA-256 of the key that signed it; empty where nobody did."""

    @property
    def charges(self) -> int:
        """How many it holds."""
        return sum(map(len, self.ledger.runs.values()))


def export_bytes(
    found: Found, view: View, key: EllipticCurvePrivateKey | None, *, now: datetime
) -> bytes:
    """A ledger as a file, signed where there is a key.

    Raises:
        PrivacyError: its charges come to no number.
    """
    whole = view.totals[0]
    if not all(map(math.isfinite, (whole.epsilon, *(run.epsilon for run in view.runs)))):
        raise PrivacyError(
            f"{found.folder}: the charges come to an infinite epsilon, which no training of this "
            "project does: a file of the ledger was changed. Nothing was exported; put the latest "
            "folder back from a backup."
        )
    ledger = Exported(
        made_at=now.astimezone(UTC).isoformat(timespec="seconds"),
        accountant=view.accountant,
        runs={name: tuple(spent) for name, spent in found.runs.items()},
        composed={
            run.name: _Composed(target_delta=run.target_delta, epsilon=run.epsilon)
            for run in view.runs
        },
        device=_Composed(target_delta=whole.target_delta, epsilon=whole.epsilon),
        max_epsilon=whole.max_epsilon,
        problems=found.problems,
    )
    file = _File(ledger=ledger)
    if key is not None:
        signature = key.sign(_signed(ledger.model_dump(mode="json")), ECDSA(SHA384()))
        file = _File(
            ledger=ledger,
            key=public_bytes(key).decode(),
            signature=b64encode(signature).decode(),
        )
    return file.model_dump_json(indent=1).encode() + b"\n"


def check_export(raw: bytes, *, where: str, expected: bytes | None = None) -> Checked:
    """An export whose signature holds, and whose charges come to what it says.

    Args:
        raw: The file.
        where: It is, for errors.
        expected: The public key of the device that should have signed it, in PEM.

    Raises:
        SignatureInvalid: it is not signed by that key, or was changed since.
        PrivacyError: it is no export, or its charges come to something else.
    """
    try:
        file = _File.model_validate_json(raw)
        values = json.loads(raw)["ledger"]
    except (ValidationError, ValueError, RecursionError) as error:
        raise PrivacyError(
            f"{where}: {_reason(error)}. This is no whole ledger that `fedcore privacy export` "
            "wrote, so nothing was verified; have the device export it again."
        ) from None
    signer = _signer(file, values, where)
    if expected is not None and signer != fingerprint(expected):
        raise SignatureInvalid(
            f"{where}: it is signed by {f'the key {signer[:16]}' if signer else 'nobody'}, and "
            f"this kit's key is {fingerprint(expected)[:16]}. It is not this device's ledger; have "
            "the device export it with --kit."
        )
    _check_sums(file.ledger, where)
    return Checked(file.ledger, signer)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"document: {error}"
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}"


def _signer(file: _File, values: Mapping[str, Any], where: str) -> str:
    if not file.signature and not file.key:
        return ""
    try:
        key = parse_public(file.key.encode(), where=where)
    except CertificateRefused:
        raise SignatureInvalid(
            f"{where}: its key is no public key of a device (ECDSA on P-384), so whoever signed it "
            "is not known. It proves nothing; have the device export it again."
        ) from None
    try:
        key.verify(b64decode(file.signature, validate=True), _signed(values), ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise SignatureInvalid(
            f"{where}: the signature does not hold: the ledger was changed after it was exported, "
            "or signed by another key. It proves nothing; have the device export it again."
        ) from None
    return fingerprint(public_bytes(key))


def _check_sums(ledger: Exported, where: str) -> None:
    if set(ledger.composed) != {name for name, spent in ledger.runs.items() if spent}:
        raise PrivacyError(
            f"{where}: the runs with charges are not those that were composed. The figures are "
            "not those of the charges; have the device export it again."
        )
    every = tuple(one for spent in ledger.runs.values() for one in spent)
    parts = [(f"run {name!r}", ledger.runs[name], one) for name, one in ledger.composed.items()]
    for what, spent, said in [*parts, ("the device", every, ledger.device)]:
        try:
            found = epsilon_of(
                [one.charge for one in spent],
                target_delta=said.target_delta,
                accountant=ledger.accountant,
            )
        except PrivacyError:  # numbers that no training has
            found = math.inf
        if not (math.isfinite(found) and abs(found - said.epsilon) <= _TOLERANCE * max(1.0, found)):
            raise PrivacyError(
                f"{where}: the charges of {what} come to epsilon {found:.6g} at delta "
                f"{said.target_delta:g}, and it says {said.epsilon:.6g}. The figures are not those "
                "of the charges; have the device export it again."
            )


def _signed(values: Mapping[str, Any]) -> bytes:
    """The bytes under the signature: one text for one value, however the file is laid out."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _DOMAIN + text.encode()
