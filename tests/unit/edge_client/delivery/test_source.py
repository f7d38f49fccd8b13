from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_client.delivery.source import CHUNK_BYTES, folder_source
from fedcore.errors import DataError, TrustError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "a.json").write_bytes(b"0123456789")
    (tmp_path / "secret").write_text("secret")
    return folder


def test_a_file_is_read_from_an_offset_in_chunks(repository: Path) -> None:
    read = folder_source(repository)
    assert b"".join(read("metadata/a.json", 0)) == b"0123456789"
    assert b"".join(read("metadata/a.json", 7)) == b"789"
    assert list(read("metadata/a.json", 10)) == []
    (repository / "big").write_bytes(b"x" * (2 * CHUNK_BYTES + 1))
    assert [len(chunk) for chunk in read("big", 0)] == [CHUNK_BYTES, CHUNK_BYTES, 1]


def test_what_is_not_there_says_so(repository: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(folder_source(repository)("metadata/none.json", 0))
    with pytest.raises(FileNotFoundError):
        list(folder_source(repository)("metadata/a.json/below", 0))
    with pytest.raises(DataError, match="--repository"):
        folder_source(repository / "metadata")


@pytest.mark.parametrize(
    "name", ["../secret", "metadata/../../secret", "/etc/passwd", "link", "dir/secret"]
)
def test_nothing_outside_is_read(repository: Path, name: str) -> None:
    (repository / "link").symlink_to(repository.parent / "secret")
    (repository / "dir").symlink_to(repository.parent)
    with pytest.raises(TrustError, match="points outside"):
        list(folder_source(repository)(name, 0))


def test_a_link_within_the_repository_is_followed(repository: Path) -> None:
    (repository / "link").symlink_to("metadata/a.json")
    assert b"".join(folder_source(repository)("link", 0)) == b"0123456789"


@pytest.mark.timeout(10)
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(repository: Path) -> None:
    os.mkfifo(repository / "pipe")
    (repository / "loop").symlink_to("loop")
    with pytest.raises(TrustError, match="regular file"):
        list(folder_source(repository)("pipe", 0))
    with pytest.raises(TrustError, match="regular file"):
        list(folder_source(repository)("metadata", 0))
    with pytest.raises(TrustError, match="loop"):
        list(folder_source(repository)("loop", 0))


def test_a_repository_behind_a_link_is_a_repository(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(repository)
    assert b"".join(folder_source(tmp_path / "current")("metadata/a.json", 0)) == b"0123456789"
