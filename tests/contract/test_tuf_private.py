"""What devices use of python-tuf that is nobody's API: the time by which its updater judges."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import ExpiredMetadataError
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

from edge_client.delivery.roots import anchor
from edge_client.delivery.source import folder_source
from edge_client.delivery.trust import _Fetcher, _Updater
from server.release.publish import initialise

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def updater(folder: Path, judged_at: datetime, number: int) -> _Updater:
    root = (folder / "keys" / "root.json").read_bytes()
    made = _Updater(
        str(folder / f"metadata-{number}"),
        "metadata",
        fetcher=_Fetcher(folder_source(folder / "repository")),
        bootstrap=anchor(folder / "trust", root).raw,
    )
    made.judge_at(judged_at)
    return made


def test_expiry_is_judged_by_the_time_that_is_set(tmp_path: Path) -> None:
    initialise(tmp_path / "repository", tmp_path / "keys", now=T0)
    for number, days in enumerate((0, 6.9)):
        made = updater(tmp_path, T0 + timedelta(days=days), number)
        assert not made.has_timestamp
        made.refresh()
        assert made.has_timestamp
        assert (made.root.version, made.timestamp.version) == (1, 1)
    made = updater(tmp_path, T0 + timedelta(days=7.1), 9)
    with pytest.raises(ExpiredMetadataError, match="timestamp"):
        made.refresh()
    assert made.has_timestamp  # though it has expired: it tells how old a copy is


def test_nothing_but_that_attribute_holds_the_time() -> None:
    names = {name for name in TrustedMetadataSet.__init__.__code__.co_names if "time" in name}
    assert names == {"datetime", "timezone", "reference_time"}
