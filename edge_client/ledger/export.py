"""Signed export of a privacy ledger for an auditor: every charge, and the epsilons they result in.

The signature proves that this device wrote the export, not that the export is complete. Anyone with
the file can recompute the epsilons.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA384
from pydantic import Field, ValidationError

from edge_client.ledger.book import StoredCharge
from edge_client.ledger.view import LedgerFiles, LedgerView
from fedcore.config.section import Fraction, Section
from fedcore.crypto.keys import MAX_KEY_BYTES, fingerprint, parse_public, public_bytes
from fedcore.errors import CertificateRefused, PrivacyError, SignatureInvalid
from fedcore.finite import all_finite
from fedcore.privacy.accounting import Accountant, epsilon_of

MAX_EXPORT_BYTES = 128 << 20
_DOMAIN = b"fedcore ledger export\x00"
_TOLERANCE = 1e-6
"""Relative tolerance for a recomputed epsilon: machines round differently."""


class _Composed(Section):
    """Epsilon of composed charges at a delta."""

    target_delta: Fraction
    epsilon: Annotated[float, Field(ge=0)]


class Exported(Section):
    """The signed part of an export."""

    format: Literal["fedcore.ledger-export/1"] = "fedcore.ledger-export/1"
    made_at: str
    """Time of the export by the device's clock, ISO 8601 in UTC."""
    accountant: Accountant
    runs: dict[str, tuple[StoredCharge, ...]]
    composed: dict[str, _Composed]
    """Epsilon of each run with charges."""
    device: _Composed
    """Epsilon over all runs."""
    max_epsilon: float | None
    """The owner's budget for the device; None without a limit."""
    problems: tuple[str, ...]
    """Faults of the ledger's files at the time of the export."""


class _File(Section):
    """Content of an export file: the ledger, the public key in PEM, and the signature in base64.

    Key and signature are empty in an unsigned export.
    """

    ledger: Exported
    key: Annotated[str, Field(max_length=MAX_KEY_BYTES)] = ""
    signature: Annotated[str, Field(max_length=1024)] = ""


@dataclass(frozen=True)
class VerifiedExport:
    """An exported ledger whose signature and epsilons `fedcore.verify_ledger_export` has verified.

    Example::

        checked = fedcore.verify_ledger_export("ledger-export.json")
        checked.signer, checked.charges, checked.ledger.device.epsilon
    """

    ledger: Exported
    signer: str
    """SHA-256 of the public key that verifies the signature; empty if the export is unsigned."""

    @property
    def charges(self) -> int:
        """Number of charges over all runs."""
        return sum(map(len, self.ledger.runs.values()))


@dataclass(frozen=True)
class LedgerExport:
    """A device's exported ledger, from `fedcore.export_ledger`.

    Example::

        exported = fedcore.export_ledger("kit", out="ledger-export.json")
        exported.ledger.device.epsilon, exported.ledger.problems
    """

    ledger: Exported
    raw: bytes = field(repr=False)
    """Content of the file, JSON."""

    @property
    def charges(self) -> int:
        """Number of charges over all runs."""
        return sum(map(len, self.ledger.runs.values()))


def make_export(
    found: LedgerFiles, view: LedgerView, key: EllipticCurvePrivateKey | None, *, now: datetime
) -> LedgerExport:
    """Returns an export, signed if there is a key.

    Args:
        found: The ledger.
        view: The same ledger, composed.
        key: The device's private key (ECDSA on P-384), or None.
        now: Time of the export.

    Raises:
        PrivacyError: an epsilon is infinite.
    """
    whole = view.totals[0]
    if not all_finite((whole.epsilon, *(run.epsilon for run in view.runs))):
        raise PrivacyError(
            f"{found.folder}: the charges add up to an infinite epsilon, which fedcore's "
            "training never charges: a file of the ledger was changed. Nothing was exported; "
            "restore the latest folder from a backup."
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
    return LedgerExport(ledger, file.model_dump_json(indent=1).encode() + b"\n")


def verify_export(raw: bytes, *, where: str, expected: bytes | None = None) -> VerifiedExport:
    """Verifies an export: checks its signature, and recomputes its epsilons from the charges.

    Args:
        raw: Content of the file.
        where: Path of the file, for errors.
        expected: Public key, in PEM, of the device that must have signed; any key, or no
            signature, is accepted when None.

    Raises:
        SignatureInvalid: the signature does not fit the content, or is not from ``expected``.
        PrivacyError: the file is not an export, or its epsilons are not those of its charges.
    """
    try:
        file = _File.model_validate_json(raw)
        values = json.loads(raw)["ledger"]
    except (ValidationError, ValueError, RecursionError) as error:
        raise PrivacyError(
            f"{where}: {_reason(error)}. This is not a complete ledger written by `fedcore "
            "privacy export`, so nothing was verified; have the device export it again."
        ) from None
    signer = _signer(file, values, where)
    if expected is not None and signer != fingerprint(expected):
        raise SignatureInvalid(
            f"{where}: it is {f'signed by the key {signer[:16]}' if signer else 'not signed'}, but "
            f"this kit's key is {fingerprint(expected)[:16]}. It is not this device's ledger; "
            "have the device export it with --kit."
        )
    _check_sums(file.ledger, where)
    return VerifiedExport(file.ledger, signer)


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
            f"{where}: its key is not a device's public key (ECDSA on P-384), so the signer is "
            "unknown. It proves nothing; have the device export it again."
        ) from None
    try:
        key.verify(b64decode(file.signature, validate=True), _signed(values), ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise SignatureInvalid(
            f"{where}: the signature is invalid: the ledger was changed after it was exported, "
            "or signed by another key. It proves nothing; have the device export it again."
        ) from None
    return fingerprint(public_bytes(key))


def _check_sums(ledger: Exported, where: str) -> None:
    if set(ledger.composed) != {name for name, spent in ledger.runs.items() if spent}:
        raise PrivacyError(
            f"{where}: the runs with charges differ from those in the totals. The totals do not "
            "match the charges; have the device export it again."
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
        except PrivacyError:  # parameters that no training produces
            found = math.inf
        if not (math.isfinite(found) and abs(found - said.epsilon) <= _TOLERANCE * max(1.0, found)):
            raise PrivacyError(
                f"{where}: the charges of {what} add up to epsilon {found:.6g} at delta "
                f"{said.target_delta:g}, but it states {said.epsilon:.6g}. The totals do not "
                "match the charges; have the device export it again."
            )


def _signed(values: Mapping[str, Any]) -> bytes:
    """Returns the bytes to sign: canonical JSON, so the file's layout does not matter."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _DOMAIN + text.encode()
