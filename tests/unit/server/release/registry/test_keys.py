from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedcore.errors import ReleaseError
from server.release.registry.keys import (
    OFFLINE,
    ONLINE,
    ROLES,
    generate_keys,
    read_keys,
    remove_keys,
    write_keys,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_read_back_and_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    keys = generate_keys()
    write_keys(keys, tmp_path / "keys")
    again = read_keys(tmp_path / "keys", (*OFFLINE, *ONLINE))
    assert {role: again.ids(role) for role in ROLES} == {role: keys.ids(role) for role in ROLES}
    assert len({keyid for role in ROLES for keyid in keys.ids(role)}) == 5
    for folder in ("", "offline", "online"):
        assert mode(tmp_path / "keys" / folder) == 0o700
    for role in OFFLINE:
        assert mode(tmp_path / "keys" / "offline" / f"{role}.pem") == 0o600
    for role in ONLINE:
        path = tmp_path / "keys" / "online" / f"{role}.pem"
        assert mode(path) == 0o600
        assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")  # PKCS#8
        load_pem_private_key(path.read_bytes(), None)


def test_a_folder_that_stood_open_is_closed(tmp_path: Path) -> None:
    (tmp_path / "keys" / "online").mkdir(parents=True, mode=0o755)
    write_keys(generate_keys(), tmp_path / "keys")
    assert mode(tmp_path / "keys") == mode(tmp_path / "keys" / "online") == 0o700


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    write_keys(generate_keys(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    with pytest.raises(ReleaseError, match="already exist"):
        write_keys(generate_keys(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before
    assert len(before) == 5


def test_one_key_that_is_there_is_enough_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "root.pem").write_text("precious")
    with pytest.raises(ReleaseError, match=r"root\.pem"):
        write_keys(generate_keys(), tmp_path)
    assert [path.name for path in tmp_path.rglob("*.pem")] == ["root.pem"]


def test_printing_keys_shows_no_secret(tmp_path: Path) -> None:
    keys = generate_keys()
    shown = f"{keys!r} {keys} {dict(keys.signers)!r}"
    for (signer,) in keys.signers.values():
        secret = signer.private_bytes.decode().splitlines()[1]
        assert secret not in shown
    assert keys.ids("root")[0][:12] in shown


@pytest.mark.parametrize("role", ["root", "timestamp"])
def test_a_missing_key_says_what_to_do(tmp_path: Path, role: str) -> None:
    write_keys(generate_keys(), tmp_path)
    next(tmp_path.rglob(f"{role}.pem")).unlink()
    hint = "offline folder" if role == "root" else "release init"
    with pytest.raises(ReleaseError, match=hint):
        read_keys(tmp_path, (*OFFLINE, *ONLINE))


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    write_keys(generate_keys(), tmp_path)
    path = tmp_path / "online" / "releases.pem"
    other = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    for wrong in (b"", b"garbage", other, path.read_bytes()[:60]):
        path.write_bytes(wrong)
        with pytest.raises(ReleaseError, match="Ed25519"):
            read_keys(tmp_path, ONLINE)
    path.write_bytes(b"x" * 5000)
    with pytest.raises(ReleaseError, match="more than"):
        read_keys(tmp_path, ONLINE)


def test_removing_takes_back_what_was_written(tmp_path: Path) -> None:
    write_keys(generate_keys(), tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    remove_keys(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["note.txt"]
