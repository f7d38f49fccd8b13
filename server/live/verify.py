"""Proof from a run's journal of who sent each update: `verify_run`, ``fedcore server verify``."""

from __future__ import annotations

import json
from contextlib import closing
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from fedcore.config.run import RunConfig
from fedcore.crypto.certificates import check_authority, parse_certificate
from fedcore.crypto.kit import KIT, MAX_KIT_BYTES, parse_kit_file
from fedcore.crypto.roster import ROSTER, Roster, check_server_folder
from fedcore.errors import DataError
from fedcore.files import read_bytes
from fedcore.observability.faults import first_fault
from fedcore.observability.words import counted
from fedcore.updates.seal import run_digest
from server.live.journal.blobs import Blobs
from server.live.journal.entries import Entries
from server.live.journal.evidence import Evidence, verify_signatures
from server.live.journal.head import JOURNAL, copied_entries
from server.live.journal.journal import VALUES
from server.live.journal.packing import read_run
from server.live.operators.backup import snapshot
from server.live.rounds.settings import device_settings
from server.report.folder import JOURNAL_FOLDER


def verify_run(
    results: str | PathLike[str], identity: str | PathLike[str] = "authority/server"
) -> Evidence:
    """Checks the devices' signatures of all replies that a run has used; changes nothing.

    A server may be running it. Works on copies of the folders, without a private key, and long
    after certificates have expired.

    Example::

        evidence = fedcore.verify_run("runs/churn", "authority/server")
        assert not evidence.faults, evidence.faults
        evidence.clients  # signed replies by device

    Args:
        results: The run's folder.
        identity: The server's folder, with the member list.

    Returns:
        What the signatures prove; ``faults`` are what they do not.

    Raises:
        DataError: there is no such run or identity, or the journal is damaged.
        TrustError: the member list is not to be trusted.
    """
    results = Path(results)
    roster = _roster(Path(identity))
    # Read before the journal, which a running server may add to: whatever is here is there, too.
    copied = copied_entries(results / JOURNAL_FOLDER)
    with snapshot(results) as copy, closing(Entries(copy / JOURNAL)) as entries:
        run_values = read_run(entries)
        try:
            run = RunConfig.model_validate_json(json.dumps(run_values["identity"]["run"]))
        except (KeyError, ValidationError) as error:
            why = first_fault(error) if isinstance(error, ValidationError) else "it has none"
            raise DataError(
                f"{results}: the configuration in the journal cannot be read ({why}): another "
                "version of fedcore wrote it. Nothing was verified; use that version."
            ) from None
        run_id = run_digest(device_settings(run, instance=run_values["instance"]))
        blobs = Blobs(copy / VALUES)
        return verify_signatures(entries, blobs, run_id=run_id, known=roster.ever, copied=copied)


def _roster(identity: Path) -> Roster:
    """Opens the member list in a server's folder, also after its certificates have expired.

    Needs no private key and writes nothing, so an auditor can run it on a copy of the files.
    """
    check_server_folder(identity)
    path = identity / KIT
    raw = read_bytes(path, max_bytes=MAX_KIT_BYTES, what="a kit")
    authority_pem = parse_kit_file(raw, where=str(path)).authority.encode()
    where = f"{path}: authority"
    authority = parse_certificate(authority_pem, where=where)
    check_authority(authority, now=authority.not_valid_before_utc, where=where)
    return Roster(identity / ROSTER, authority_pem)


def shown_evidence(evidence: Evidence) -> str:
    """Returns what the signatures prove, and what they do not, in lines to print."""
    clients = ", ".join(f"{name} {count}" for name, count in evidence.clients.items())
    lines = [
        f"Signatures: {evidence.signatures} sound, {evidence.updates} of updates; "
        f"{counted(evidence.rounds, 'round')} over",
        f"Clients:    {clients or 'none'}",
        *(f"Revoked:    {one}" for one in evidence.revoked),
        *(
            f"{one.kind.capitalize() + ':':<11} round {one.round}, {one.purpose}: {one.what}"
            for one in evidence.faults
        ),
    ]
    return "\n".join(lines)
