"""``fedcore privacy export`` and the auditor's ``verify --export``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from edge_client.ledger import commands as ledger_commands
from edge_client.ledger.book import LEDGER
from edge_client.ledger.export import verify_export
from fedcore.crypto.keys import fingerprint
from fedcore.errors import DataError, FedcoreError, PrivacyError, SignatureInvalid
from tests.unit.edge_client.ledger.sites import DELTA, Site, epsilon


def test_an_export_is_signed_and_can_be_computed_again(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    out = site.root / "export.json"
    before = site.files()
    words = ("--kit", site.kit, "--owner", site.owner, "--accountant", "rdp", "--out", out)
    assert site.run(ledger_commands.export, *words) == 0
    assert {path: raw for path, raw in site.files().items() if path != out} == before
    checked = verify_export(out.read_bytes(), where="export", expected=site.public)
    assert checked.signer == fingerprint(site.public)
    assert checked.ledger.device.epsilon == pytest.approx(epsilon(3, 1.2, DELTA, more=20))
    assert checked.ledger.composed["digits"].epsilon == pytest.approx(epsilon(3, 1.2))
    capsys.readouterr()
    assert site.run(ledger_commands.verify, "--export", out, "--kit", site.kit) == 0
    assert "23 charges come to epsilon" in capsys.readouterr().out
    assert site.run(ledger_commands.verify, "--export", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["signer"] == fingerprint(site.public)


def test_an_export_that_was_changed_is_refused(
    site: Site, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.run(ledger_commands.export, "--kit", site.kit, "--accountant", "rdp") == 0
    raw = capsys.readouterr().out
    other = Site(tmp_path_factory.mktemp("other"))
    with pytest.raises(SignatureInvalid, match="It is not this device's ledger"):
        verify_export(raw.encode(), where="export", expected=other.public)
    for was, is_now in (('"steps": 10', '"steps": 9'), ('"round": 1', '"round": 2')):
        with pytest.raises(SignatureInvalid, match="the signature is invalid"):
            verify_export(raw.replace(was, is_now, 1).encode(), where="export")
    unsigned = json.loads(raw) | {"key": "", "signature": ""}
    assert verify_export(json.dumps(unsigned).encode(), where="export").signer == ""
    with pytest.raises(SignatureInvalid, match="not signed"):
        verify_export(json.dumps(unsigned).encode(), where="export", expected=site.public)
    unsigned["ledger"]["device"]["epsilon"] /= 2
    with pytest.raises(PrivacyError, match="the charges of the device add up to epsilon"):
        verify_export(json.dumps(unsigned).encode(), where="export")
    del unsigned["ledger"]["composed"]["digits"]
    with pytest.raises(PrivacyError, match="differ from those in the totals"):
        verify_export(json.dumps(unsigned).encode(), where="export")
    for nonsense in (b"", b"{}", b"[]", b"\xff"):
        with pytest.raises(PrivacyError, match="not a complete ledger"):
            verify_export(nonsense, where="export")


def _unsigned(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    told = json.loads(raw) | {"key": "", "signature": ""}
    change(told)
    return json.dumps(told).encode()


@pytest.mark.parametrize(
    ("harm", "error", "told"),
    [
        (lambda raw: raw[:500], PrivacyError, "not a complete ledger"),
        (lambda raw: b"", PrivacyError, "not a complete ledger"),
        (lambda raw: b"\xff\xfe", PrivacyError, "not a complete ledger"),
        (lambda raw: b"[" * 10**5, PrivacyError, "not a complete ledger"),
        (lambda raw: raw.replace(b"export/1", b"export/9"), PrivacyError, "ledger.format"),
        (lambda raw: raw.replace(b'"steps": 10', b'"steps": 11'), SignatureInvalid, "is invalid"),
        (
            lambda raw: raw.replace(b"PUBLIC KEY", b"PICTURE"),
            SignatureInvalid,
            "not a device's public key",
        ),
        (
            lambda raw: json.dumps(json.loads(raw) | {"signature": "\u00e9"}).encode(),
            SignatureInvalid,
            "is invalid",
        ),
        (
            lambda raw: _unsigned(
                raw, lambda t: t["ledger"]["runs"]["digits"][0].update(steps=10**400)
            ),
            PrivacyError,
            "add up to epsilon inf",
        ),
        (
            lambda raw: _unsigned(
                raw, lambda t: t["ledger"]["runs"]["digits"][0].update(noise_multiplier=1e-300)
            ),
            PrivacyError,
            "add up to epsilon inf",
        ),
    ],
    ids=[
        *("truncated", "empty", "no text", "deep", "other format", "changed", "no key"),
        *("no signature", "steps past any float", "next to no noise"),
    ],
)
def test_an_export_that_is_none_is_refused_by_name(
    site: Site, harm: Any, error: type[FedcoreError], told: str
) -> None:
    path = site.root / "export.json"
    words = ("--kit", site.kit, "--accountant", "rdp", "--out", path)
    assert site.run(ledger_commands.export, *words) == 0
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(error, match=told) as refused:
        site.run(ledger_commands.verify, "--export", path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_verified_and_by_whose_kit_must_be_there(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = site.root / "export.json"
    with pytest.raises(DataError, match=r"does not exist\. Nothing was verified; pass"):
        site.run(ledger_commands.verify, "--export", path)
    with pytest.raises(DataError, match="a folder or another kind of file"):
        site.run(ledger_commands.verify, "--export", site.root)
    assert site.run(ledger_commands.export, "--kit", site.kit, "--out", path) == 0
    nobody = site.root / "nosuch"
    for words in (("--export", path), ("--state", site.state)):
        with pytest.raises(DataError, match="is not the folder of a device's kit"):
            site.run(ledger_commands.verify, *words, "--kit", nobody)
    other = Site(tmp_path_factory.mktemp("other"))
    with pytest.raises(SignatureInvalid, match="this kit's key is"):
        site.run(ledger_commands.verify, "--export", path, "--kit", other.kit)


def test_what_a_file_says_acts_on_no_terminal(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    path = site.root / "export.json"
    assert site.run(ledger_commands.export, "--kit", site.kit, "--out", path) == 0
    evil = "\x1b[31m" + "now"
    path.write_bytes(
        _unsigned(path.read_bytes(), lambda t: t["ledger"].update(made_at=evil, problems=[evil]))
    )
    capsys.readouterr()
    assert site.run(ledger_commands.verify, "--export", path) == PrivacyError.exit_code
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "[31mnow" in said.out


def test_charges_that_come_to_no_number_are_shown_and_not_exported(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = json.loads((site.state / LEDGER).read_text())
    for spent in ledger["runs"]["digits"]:
        spent["noise_multiplier"] = 1e-300
    (site.state / LEDGER).write_text(json.dumps(ledger))
    (site.state / "state" / "digits.state").unlink()
    words = ("--state", site.state, "--accountant", "rdp")
    assert site.run(ledger_commands.show, *words) == 0
    assert "run digits: epsilon ∞ at delta" in capsys.readouterr().out
    assert site.run(ledger_commands.show, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["totals"][0]["epsilon"] is None
    with pytest.raises(PrivacyError, match="an infinite epsilon"):
        site.run(ledger_commands.export, *words)
