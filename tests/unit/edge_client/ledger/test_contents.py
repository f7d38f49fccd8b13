"""What tells data sets apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.ledger import contents
from edge_client.ledger.contents import (
    CONTENTS,
    Contents,
    counted_with,
    digests_of,
    label_of,
    name_in,
    read_contents,
    record_contents,
)
from fedcore.errors import DataError, PrivacyError


def test_files_are_told_by_content_and_not_by_name_or_place(tmp_path: Path) -> None:
    for path in ("one/a", "one/below/b", "other/c"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("same")
    (tmp_path / "one" / "empty").touch()
    (tmp_path / "other" / "d").write_text("another")
    one, other = (list(digests_of("x", tmp_path / name)) for name in ("one", "other"))
    assert len(one) == 2
    assert set(one) == {one[0]}
    assert one[0] in other
    assert len(set(other)) == 2


def test_a_label_names_what_was_there_when_it_was_written(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    assert record_contents(tmp_path, "ward", data) == ""
    assert not (tmp_path / CONTENTS).exists()
    (data / "a").write_text("1")
    first = record_contents(tmp_path, "ward", data)
    (data / "a").write_text("22")
    second = record_contents(tmp_path, "ward", data)
    assert name_in(first) == name_in(second) == "ward"
    assert (first.split(":")[1], second.split(":")[1]) == ("1", "2")
    assert (tmp_path / CONTENTS).stat().st_mode & 0o777 == 0o600
    held = read_contents(tmp_path)
    assert counted_with("ward", {first, second}, held) == {"ward"}
    (tmp_path / CONTENTS).write_text("{")
    assert read_contents(tmp_path) == Contents()


@pytest.mark.parametrize(
    "label", ["", "/srv/data", "ward", "ward:1", "ward:1:zz", "a b:1:" + "0" * 64]
)
def test_what_is_no_label_names_nothing(label: str) -> None:
    assert name_in(label) == ""


def test_names_are_counted_together_as_far_as_files_lead() -> None:
    a, b, c, d = (letter * 16 for letter in "abcd")
    held = Contents(names={"one": (a,), "two": (a, b), "three": (b, c), "four": (d,)})
    labels = {label_of(name, digests) for name, digests in held.names.items()}
    assert counted_with("one", labels, held) == {"one", "two", "three"}
    assert counted_with("four", labels, held) == {"four"}
    assert counted_with("", labels, held) is None
    assert counted_with("five", labels, held) is None
    lost = {*labels, label_of("six", (a, b, c, d))}
    assert counted_with("four", lost, held) == {"four", "six"}
    assert counted_with("six", lost, held) is None
    changed = {*labels, label_of("four", (a,))}
    assert counted_with("four", changed, held) is None


def test_links_are_followed_and_a_circle_of_them_is_seen_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").write_text("1")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "nowhere").symlink_to(tmp_path / "nosuch")
    assert len(list(digests_of("x", tmp_path / "data"))) == 1


def test_a_file_that_is_not_changed_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    first = list(digests_of("x", tmp_path))
    monkeypatch.setattr(contents.hashlib, "sha256", lambda: pytest.fail("it was read again"))
    assert list(digests_of("x", tmp_path)) == first


@pytest.mark.parametrize(("limit", "most"), [("MAX_FILES", 2), ("MAX_BYTES", 2)])
def test_what_is_too_large_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(contents, limit, most)
    with pytest.raises(PrivacyError, match=r"the data set 'ward' has more than .* remove it from"):
        list(digests_of("ward", tmp_path))


def test_a_folder_that_is_gone_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read this folder of a data set"):
        list(digests_of("ward", tmp_path / "nosuch"))
