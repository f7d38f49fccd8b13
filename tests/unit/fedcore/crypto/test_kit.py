from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.certificates import pem
from fedcore.crypto.keys import load_key, new_key, public_bytes, save_key
from fedcore.crypto.kit import KEY, KIT, client_context, load_identity, load_kit
from fedcore.errors import CertificateRefused, DataError


def edit(folder: Path, **changed: Any) -> None:
    path = folder / KIT
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_a_kit_is_whom_its_certificate_names(tmp_path: Path, project: Any, now: Any) -> None:
    kit = load_kit(project.device(tmp_path))
    assert (kit.project, kit.name, kit.role) == ("orchard", "edge-1", "device")
    assert kit.servers == ("https://localhost:9092", "https://[::1]:9092")
    assert kit.public == public_bytes(load_key(kit.key_path))
    assert kit.authority_pem == pem(project.authority)
    assert kit.not_after == now + timedelta(days=90)


def test_a_kit_shows_no_private_key(tmp_path: Path, project: Any) -> None:
    kit = load_kit(project.device(tmp_path))
    secret = kit.key_path.read_text().splitlines()[1]
    assert secret not in repr(kit)
    assert secret not in (tmp_path / KIT).read_text()


def test_a_swapped_key_is_noticed(tmp_path: Path, project: Any) -> None:
    save_key(project.device(tmp_path) / KEY, new_key())
    with pytest.raises(CertificateRefused, match=r"key\.pem does not match the certificate"):
        load_kit(tmp_path)


def test_an_open_key_is_refused(tmp_path: Path, project: Any) -> None:
    (project.device(tmp_path) / KEY).chmod(0o644)
    with pytest.raises(CertificateRefused, match="mode 0644, expected 0600"):
        load_kit(tmp_path)


def test_what_is_missing_is_said_with_the_next_step(tmp_path: Path, project: Any) -> None:
    with pytest.raises(DataError, match=r"no kit is installed.*fedcore client enrol"):
        load_kit(tmp_path)
    (project.device(tmp_path) / KEY).unlink()
    with pytest.raises(DataError, match="a private key does not exist"):
        load_kit(tmp_path)


def test_a_kit_expires(tmp_path: Path, project: Any, now: Any) -> None:
    project.device(tmp_path)
    quarter, skew = timedelta(days=90), timedelta(minutes=10)
    assert load_kit(tmp_path, now=now + quarter + skew)
    with pytest.raises(CertificateRefused, match=r"expired.*fedcore provision renew"):
        load_kit(tmp_path, now=now + quarter + 2 * skew)
    with pytest.raises(CertificateRefused, match="set the clock correctly"):
        load_kit(tmp_path, now=now - timedelta(hours=1))


def test_a_server_is_no_member(tmp_path: Path, project: Any) -> None:
    project.server(tmp_path)
    assert load_identity(tmp_path).role == "server"
    with pytest.raises(CertificateRefused, match="this is a server's identity"):
        load_kit(tmp_path)


def test_a_certificate_of_another_authority_makes_no_kit(
    tmp_path: Path, project: Any, impostor: Any
) -> None:
    project.device(tmp_path)
    edit(tmp_path, authority=pem(impostor.authority).decode())
    with pytest.raises(CertificateRefused, match="not issued by the authority"):
        load_kit(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "fedcore.kit/2"},
        {"role": "operator"},
        {"servers": []},
        {"servers": ["http://localhost:9092"]},
        {"servers": ["https://localhost"]},
        {"servers": ["https://localhost:9092/path"]},
        {"servers": ["https://user@localhost:9092"]},
        {"servers": ["https://localhost:9092"] * 31},
        {"servers": "https://localhost:9092"},
        {"certificate": None},
        {"certificate": "x" * 9000},
        {"certificate": "garbage"},
        {"authority": "garbage"},
    ],
    ids=str,
)
def test_a_tampered_kit_is_refused(
    tmp_path: Path, project: Any, changed: dict[str, object]
) -> None:
    edit(project.device(tmp_path), **changed)
    with pytest.raises(CertificateRefused, match=str(tmp_path / KIT)):
        load_kit(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\xff\xfe", b"[]", b"{" * 3000])
def test_garbage_is_no_kit(tmp_path: Path, project: Any, raw: bytes) -> None:
    (project.device(tmp_path) / KIT).write_bytes(raw)
    with pytest.raises(CertificateRefused, match="not a kit of a known format"):
        load_kit(tmp_path)


def test_a_kit_has_a_limit(tmp_path: Path, project: Any) -> None:
    (project.device(tmp_path) / KIT).write_bytes(b" " * 40_000)
    with pytest.raises(DataError, match="more than the 32768"):
        load_kit(tmp_path)


def test_a_context_leaves_no_file_behind(
    tmp_path: Path, project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = load_kit(project.device(tmp_path / "kit"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert client_context(kit).check_hostname
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_key_that_no_kit_has_is_shown_as_a_terminal_can_take_it(
    tmp_path: Path, project: Any
) -> None:
    edit(project.device(tmp_path), **{"\x1b[2J" + "x" * 5000: 1})
    with pytest.raises(CertificateRefused, match=r"\\x1b\[2Jx+\.\.\. .* not permitted") as caught:
        load_kit(tmp_path)
    assert len(str(caught.value)) < 400
