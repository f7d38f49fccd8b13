"""Proof from a run's journal of who sent each update; the basis of ``fedcore server verify``."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError

from fedcore.config.run import RunConfig
from fedcore.crypto.roster import Roster, check_server_folder, load_server_identity
from fedcore.errors import DataError
from fedcore.observability.faults import first_fault
from fedcore.observability.words import counted
from fedcore.updates.seal import run_digest
from server.live.journal.blobs import Blobs
from server.live.journal.entries import Entries
from server.live.journal.evidence import Evidence, verify_signatures
from server.live.journal.head import JOURNAL
from server.live.journal.journal import VALUES
from server.live.journal.packing import read_run
from server.live.operators.backup import snapshot
from server.live.rounds.settings import device_settings


def verify_run(results: Path, identity: Path) -> Evidence:
    """Checks the signatures of all replies that a run has used; a server may be running it.

    Args:
        results: The run's folder.
        identity: The server's folder, with the member list.

    Raises:
        DataError: there is no such run or identity, or the journal is damaged.
        TrustError: the member list is not to be trusted.
    """
    check_server_folder(identity)
    server = load_server_identity(identity)
    # Writes nothing there: whoever verifies may not be who runs the server.
    roster = Roster(server.roster_path, server.kit.authority_pem)
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
        return verify_signatures(entries, Blobs(copy / VALUES), run_id=run_id, known=roster.ever)


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
