"""A repository of releases, kept from Python."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import fedcore
from fedcore.errors import ReleaseError
from tests.unit.server.release.conftest import Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = fedcore.create_repository(tmp_path / "releases", str(tmp_path / "keys"))
    assert made.root == tmp_path / "keys" / "root.json"
    return Publisher(made.repository, made.keys)


def test_a_repository_is_made_listed_rolled_back_and_renewed(
    publisher: Publisher, capfd: pytest.CaptureFixture[str]
) -> None:
    places = (str(publisher.repository), publisher.keys)
    assert fedcore.list_releases(*places) == ()
    for raw in (b"one", b"two"):
        publisher.publish(raw)
    back = fedcore.roll_back("digits", 1, repository=places[0], keys=places[1])
    assert (back.version, back.lineage.rollback_of) == (3, 1)
    listed = fedcore.list_releases(*places)
    assert [one.version for one in listed] == [1, 2, 3]
    assert listed[2].onnx.sha256 == listed[0].onnx.sha256
    expiry = fedcore.refresh_repository(*places, offline=True)
    assert list(expiry) == ["root", "targets", "releases", "snapshot", "timestamp"]
    year = datetime.now(UTC) + timedelta(days=364)
    assert expiry["timestamp"] < expiry["releases"] < year < expiry["root"]
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_keys_are_rotated_by_group_and_what_a_thief_published_is_withdrawn(
    publisher: Publisher,
) -> None:
    for raw in (b"one", b"two"):
        publisher.publish(raw)
    places = (publisher.repository, publisher.keys)
    done = fedcore.rotate_keys(*places, last_good={"digits": 1})
    assert done.roles == ("releases", "snapshot", "timestamp")  # online
    assert done.epochs == {"digits": 1}
    assert all(not path.exists() for path in done.removed)
    done = fedcore.rotate_keys(*places, roles=["offline"], thresholds={"root": (2, 3)})
    assert (done.roles, done.root_version) == (("root", "targets"), 3)
    assert len(done.written) == 4
    assert fedcore.rotate_keys(*places, roles=["root"]).roles == ("root",)


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ({"boot": (1, 1)}, r"'boot' is no role; expected one of root, targets"),
        ({"root": (3, 2)}, "3 of 2 keys"),
        ({"root": 2}, r"root is 2; expected how many of how many"),
        ({"root": (2,)}, r"expected how many of how many keys"),
        ({"root": ("2", "3")}, "expected how many of how many keys"),
        ({"root": (True, True)}, "expected how many of how many keys"),
    ],
)
def test_what_is_no_threshold_is_refused_before_anything_is_written(
    tmp_path: Path, thresholds: dict[str, tuple[int, int]], said: str
) -> None:
    with pytest.raises(ReleaseError, match=said):
        fedcore.create_repository(tmp_path / "r", tmp_path / "k", thresholds=thresholds)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_a_typed_error(publisher: Publisher, tmp_path: Path) -> None:
    places = {"repository": publisher.repository, "keys": publisher.keys}
    with pytest.raises(ReleaseError, match="exist"):
        fedcore.create_repository(**places)
    with pytest.raises(ReleaseError, match="not available for rollback"):
        fedcore.roll_back("digits", 7, **places)
    with pytest.raises(ReleaseError, match="role 'boot'"):
        fedcore.rotate_keys(**places, roles=["boot"])
    for call in (fedcore.list_releases, fedcore.refresh_repository, fedcore.rotate_keys):
        with pytest.raises(ReleaseError):
            call(tmp_path / "none", publisher.keys)


def test_models_that_are_named_alone_may_be_published(tmp_path: Path) -> None:
    made = fedcore.create_repository(tmp_path / "r", tmp_path / "k", models=["digits"])
    bound = Publisher(made.repository, made.keys)
    assert bound.publish().version == 1
    with pytest.raises(ReleaseError, match="may not publish a model named 'letters'"):
        bound.publish(model="letters")
