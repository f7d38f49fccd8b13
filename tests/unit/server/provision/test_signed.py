"""What the authority signs and chains, edited by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.keys import new_key, save_key
from fedcore.crypto.roster import ROSTER, RosterFile, load_server_identity
from fedcore.errors import CertificateRefused, DataError, RollbackRefused, SignatureInvalid
from server.doctor import _log, _roster
from server.operator_log import verify_audit
from server.provision.folder import read_authority
from server.provision.issue import revoke, sign_roster
from server.provision.membership import listing


@pytest.fixture
def revoked(desk: Any) -> Any:
    desk.certify("edge-1", num_examples=10)
    desk.certify("edge-2", num_examples=10)
    revoke(desk.act, "edge-1")
    return desk


def edit(path: Path, **update: Any) -> None:
    file = json.loads(path.read_bytes())
    file["members"][0] |= update
    path.write_text(json.dumps(file))


@pytest.mark.parametrize("update", [{"revoked_at": None}, {"num_examples": 1_000_000}])
def test_a_roster_edited_by_hand_is_refused_by_everything_that_reads_it(
    revoked: Any, update: dict[str, Any]
) -> None:
    identity = load_server_identity(revoked.folder / "server", now=revoked.act.now)
    roster = identity.roster()
    assert [member.name for member in roster.members()] == ["edge-2"] or not roster.members()
    edit(revoked.folder / ROSTER, **update)
    for look in (
        lambda: listing(revoked.act),
        lambda: revoke(revoked.act, "edge-2"),
        lambda: revoked.certify("edge-3"),
        lambda: sign_roster(revoked.act),  # it makes no edit good
        lambda: _roster(identity),
        identity.roster,
    ):
        with pytest.raises(SignatureInvalid, match="changed by hand"):
            look()


def test_the_key_of_rosters_is_kept_to_itself(revoked: Any) -> None:
    key = revoked.folder / "roster.key"
    key.chmod(0o644)
    with pytest.raises(CertificateRefused, match="mode 0644"):
        revoke(revoked.act, "edge-2")
    save_key(key, new_key())
    with pytest.raises(CertificateRefused, match="not the key that signed"):
        revoke(revoked.act, "edge-2")
    key.unlink()
    with pytest.raises(DataError, match="fedcore provision sign"):
        revoke(revoked.act, "edge-2")
    sign_roster(revoked.act)
    revoke(revoked.act, "edge-2")
    assert all(one.revoked_at for one in listing(revoked.act).members)


def test_a_new_key_of_rosters_takes_the_place_of_a_stolen_one(revoked: Any) -> None:
    stolen = (revoked.folder / ROSTER).read_bytes()
    identity = load_server_identity(revoked.folder / "server", now=revoked.act.now)
    identity.roster()
    assert sign_roster(revoked.act).roster.signer is not None
    assert identity.roster().version == RosterFile.model_validate_json(stolen).version + 1
    (revoked.folder / ROSTER).write_bytes(stolen)
    with pytest.raises(RollbackRefused):
        identity.roster()


def test_a_project_that_was_begun_before_rosters_were_signed_is_signed_once(revoked: Any) -> None:
    path = revoked.folder / ROSTER
    file = RosterFile.model_validate_json(path.read_bytes())
    path.write_bytes(file.model_copy(update={"signer": None, "signature": None}).to_bytes())
    (revoked.folder / "roster.key").unlink()
    with pytest.raises(SignatureInvalid, match="not signed"):
        listing(revoked.act)
    sign_roster(revoked.act)
    states = [bool(one.revoked_at) for one in listing(revoked.act).members]
    assert states == [True, False]
    assert read_authority(revoked.folder, now=revoked.act.now).roster.signer is not None


def test_the_authoritys_log_is_chained_and_a_cut_one_is_noticed(revoked: Any) -> None:
    log = revoked.folder / "audit.jsonl"
    whole = log.read_bytes()
    assert verify_audit(log) == 5
    assert _log(log).verdict == "ok"
    lines = whole.splitlines(keepends=True)
    log.write_bytes(whole.replace(b'"edge-1"', b'"edge-9"', 1))
    with pytest.raises(DataError, match="does not follow"):
        verify_audit(log)
    for cut in (b"".join(lines[:-1]), b""):
        log.write_bytes(cut)
        with pytest.raises(DataError, match="truncated or changed"):
            verify_audit(log)
        with pytest.raises(DataError, match="truncated or changed"):
            revoke(revoked.act, "edge-2")
    log.write_bytes(whole)
    revoke(revoked.act, "edge-2")
    assert verify_audit(log) == 6


def test_a_log_that_was_begun_without_a_chain_goes_on_with_one(revoked: Any) -> None:
    log = revoked.folder / "audit.jsonl"
    loose = [
        json.dumps({key: value for key, value in json.loads(line).items() if key != "before"})
        for line in log.read_text().splitlines()
    ]
    log.write_text("\n".join(loose) + "\n")
    (revoked.folder / "audit.mark").unlink()
    revoke(revoked.act, "edge-2")
    assert verify_audit(log, begun_loose=True) == 6
    with pytest.raises(DataError, match="does not follow"):
        verify_audit(log)
    log.write_text(log.read_text().replace("edge-1", "edge-9"))
    with pytest.raises(DataError):
        verify_audit(log, begun_loose=True)
