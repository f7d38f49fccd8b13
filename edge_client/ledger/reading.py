"""A device's privacy ledger as calls: read, verify, export. All are read-only.

These are part of the Python API; ``fedcore privacy show | verify | export`` call the same. They
need ``fedcore[train]``, as a device that trains does, and do not import torch.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path

from edge_client.ledger.export import (
    MAX_EXPORT_BYTES,
    LedgerExport,
    VerifiedExport,
    make_export,
    verify_export,
)
from edge_client.ledger.view import LedgerFiles, LedgerView, public_of, read_ledger_files, view_of
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy, load_owner
from fedcore.config.run import Privacy
from fedcore.crypto.keys import load_key
from fedcore.crypto.kit import KEY
from fedcore.errors import ConfigError, DataError
from fedcore.files import check_file, read_bytes, write_atomic
from fedcore.privacy.accounting import Accountant

Place = str | PathLike[str]
DEFAULT_ACCOUNTANT: Accountant = Privacy().accountant


def read_ledger(
    kit: Place | None = None,
    *,
    state: Place | None = None,
    owner: OwnerPolicy | Place = OPEN_POLICY,
    accountant: Accountant = DEFAULT_ACCOUNTANT,
    max_lines: int | None = None,
) -> LedgerView:
    """Reads what a device has spent: epsilon by run and round, and what its owner's budget leaves.

    A damaged ledger is no error: ``problems`` names the faults, and every epsilon is then a lower
    bound.

    Example::

        ledger = fedcore.read_ledger("kit", owner="owner.toml")
        ledger.totals[0].epsilon, ledger.totals[0].left
        [(run.name, run.epsilon, run.room) for run in ledger.runs]

    Args:
        kit: Folder of the device's kit, whose mark and count are compared with the ledger.
        state: Folder of the ledger; ``device`` in the folder of the kit when None.
        owner: The owner's policy, or its file, with the budgets.
        accountant: Method of composition, ``prv`` or ``rdp``.
        max_lines: Most charges to list per run, the first and last ones; composing each takes time.

    Raises:
        ConfigError: neither ``kit`` nor ``state`` is given, or the owner's file is not valid.
        DataError: a folder does not exist.
        DeviceError: the ledger belongs to another device's kit.
    """
    policy = owner if isinstance(owner, OwnerPolicy) else load_owner(Path(owner))
    return view_of(verify_ledger(kit, state=state), policy, accountant, max_lines=max_lines)


def verify_ledger(kit: Place | None = None, *, state: Place | None = None) -> LedgerFiles:
    """Compares all files in which a device records what it has spent.

    Example::

        files = fedcore.verify_ledger("kit")
        assert not files.problems, files.problems

    Args:
        kit: Folder of the device's kit, whose mark and count are compared with the ledger.
        state: Folder of the ledger; ``device`` in the folder of the kit when None.

    Returns:
        All charges, and what is wrong: ``problems``, which keep the device from training with
        privacy; ``behind``, which its next start repairs; ``notes``.

    Raises:
        ConfigError: neither ``kit`` nor ``state`` is given.
        DataError: a folder does not exist, or the kit has no key.
        DeviceError: the ledger belongs to another device's kit.
    """
    if kit is None and state is None:
        raise ConfigError(
            "expected --state or --kit, got neither. Nothing was read; pass one of them."
        )
    folder = Path(state) if state is not None else Path(kit or "") / "device"
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder. Nothing was read; pass the folder of the "
            "device's ledger with --state, the same as for its `fedcore client start`."
        )
    return read_ledger_files(folder, None if kit is None else Path(kit), os.environ)


def export_ledger(
    kit: Place | None = None,
    *,
    state: Place | None = None,
    owner: OwnerPolicy | Place = OPEN_POLICY,
    accountant: Accountant = DEFAULT_ACCOUNTANT,
    out: Place | None = None,
) -> LedgerExport:
    """Exports all charges and their totals, signed by the device, for an auditor.

    Example::

        exported = fedcore.export_ledger("kit", out="ledger-export.json")
        assert fedcore.verify_ledger_export("ledger-export.json").ledger == exported.ledger

    Args:
        kit: Folder of the device's kit, whose key signs; the export is unsigned when None.
        state: Folder of the ledger; ``device`` in the folder of the kit when None.
        owner: The owner's policy, or its file, with the budgets.
        accountant: Method of composition, ``prv`` or ``rdp``.
        out: File to write; an existing one is replaced.

    Returns:
        The export; ``ledger.problems`` names faults of the ledger.

    Raises:
        ConfigError: neither ``kit`` nor ``state`` is given, or the owner's file is not valid.
        DataError: a folder does not exist.
        DeviceError: the ledger belongs to another device's kit.
        PrivacyError: an epsilon is infinite, as a file of the ledger was changed.
        ResourceError: the file cannot be written.
    """
    if out is not None:
        check_file(Path(out), option="--out")
    policy = owner if isinstance(owner, OwnerPolicy) else load_owner(Path(owner))
    found = verify_ledger(kit, state=state)
    view = view_of(found, policy, accountant)
    key = load_key(Path(kit) / KEY) if kit is not None else None
    exported = make_export(found, view, key, now=datetime.now(UTC))
    if out is not None:
        write_atomic(Path(out), exported.raw)
    return exported


def verify_ledger_export(file: Place, *, kit: Place | None = None) -> VerifiedExport:
    """Verifies an exported ledger: its signature, and its epsilons, recomputed from the charges.

    Example::

        checked = fedcore.verify_ledger_export("ledger-export.json", kit="kit")
        checked.ledger.device.epsilon, checked.charges, checked.signer

    Args:
        file: A file that `fedcore.export_ledger` wrote.
        kit: Folder of the kit of the device that must have signed it; any device when None.

    Raises:
        DataError: the file or the kit is missing.
        SignatureInvalid: the signature does not fit the content, or is not of that device.
        PrivacyError: the file is not an export, or its epsilons are not those of its charges.
    """
    raw = read_bytes(
        Path(file),
        max_bytes=MAX_EXPORT_BYTES,
        what="an exported ledger",
        otherwise="Nothing was verified; pass a file written by `fedcore privacy export --out`.",
    )
    expected = public_of(Path(kit)) if kit is not None else None
    return verify_export(raw, where=str(file), expected=expected)
