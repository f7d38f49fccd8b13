from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.config.owner import OPEN_POLICY, OwnerPolicy, load_owner, tighten
from fedcore.config.run import ClientConfig, Privacy, RunConfig
from fedcore.errors import ConfigError, OwnerLimit, PrivacyError
from fedcore.training.bounds import bounds_of

RUN = RunConfig(
    name="x",
    task="t.py",
    privacy=Privacy(unit="example", max_epsilon=4.0, target_delta=1e-4),
    client=ClientConfig(epochs=3, device="auto"),
)


def test_an_owner_who_asks_for_nothing_changes_nothing() -> None:
    assert tighten(RUN, OPEN_POLICY) == RUN


def test_a_stricter_owner_has_the_last_word() -> None:
    done = tighten(RUN, OwnerPolicy(max_epsilon=1.0, target_delta=1e-6, device="cpu"))
    assert (done.privacy.max_epsilon, done.privacy.target_delta) == (1.0, 1e-6)
    assert done.client.device == "cpu"
    assert done.client.epochs == 3


def test_a_looser_owner_does_not_loosen_what_the_server_asked() -> None:
    done = tighten(RUN, OwnerPolicy(max_epsilon=100.0, target_delta=0.1))
    assert done.privacy == RUN.privacy


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('data = ""', "data = '' is not a folder name"),
        ('data = "a\\u0000b"', "is not a folder name"),
        ("hours = []", "this device would never take part"),
        ("max_threads = 99999999999999999999999999", "less than or equal to 65536"),
        ("max_memory_bytes = 99999999999999999999999999", "less than or equal to 1000000000000000"),
        ("max_bandwidth_bytes_per_s = 99999999999999999999999999", "equal to 1000000000000"),
        ("max_epsilon = 1e-320", "greater than or equal to 0.01"),
    ],
)
def test_values_that_can_mean_nothing_are_refused(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "owner.toml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError) as refused:
        load_owner(path)
    assert told in str(refused.value)
    assert str(path) in str(refused.value)
    assert line.partition(" ")[0] in str(refused.value)


def test_a_folder_of_data_must_be_there(tmp_path: Path) -> None:
    path, data = tmp_path / "owner.toml", tmp_path / "data"
    (tmp_path / "file").touch()
    for missing in (data, tmp_path / "file", tmp_path / ("x" * 300)):
        path.write_text(f'data = "{missing}"\n')
        with pytest.raises(
            ConfigError, match=r"there is no accessible folder .* Nothing was run; create it"
        ):
            load_owner(path)
    data.mkdir()
    path.write_text(f'data = "{data}"\n')
    assert load_owner(path).data_folder == data


DATASETS = """
max_epsilon = 4.0
[[datasets]]
name = "2026"
path = "{one}"
[[datasets]]
name = "2027"
path = "{other}"
max_epsilon = 2.0
"""


def test_data_sets_are_found_by_where_the_data_are(tmp_path: Path) -> None:
    path = tmp_path / "owner.toml"
    path.write_text(DATASETS.format(one=tmp_path / "a", other=tmp_path / "b"))
    (tmp_path / "b" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    owner = load_owner(path)
    for folder, name in (
        (tmp_path / "a", "2026"),
        (tmp_path / "b" / "below", "2027"),
        (tmp_path / "link", "2027"),
        (tmp_path / "ab", None),
        (tmp_path, None),
        (None, None),
    ):
        found = owner.data_set(folder)
        assert (found.name if found else None) == name
    assert owner.on(tmp_path / "b").max_epsilon == 2.0
    assert owner.on(tmp_path / "a") is owner
    assert owner.budget(["2026"]) == owner.budget(["gone"]) == 4.0
    assert owner.budget(["2026", "2027"]) == 2.0
    assert OwnerPolicy().budget(["2026"]) is None


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ("a", "a/below", "'2026' and '2027' overlap"),
        ("a", "a", "overlap"),
    ],
)
def test_data_sets_that_overlap_are_refused(
    tmp_path: Path, one: str, other: str, told: str
) -> None:
    path = tmp_path / "owner.toml"
    path.write_text(DATASETS.format(one=tmp_path / one, other=tmp_path / other))
    with pytest.raises(ConfigError) as refused:
        load_owner(path)
    assert told in str(refused.value)


def test_a_data_set_has_one_name_and_a_name_one_data_set(tmp_path: Path) -> None:
    path = tmp_path / "owner.toml"
    text = DATASETS.format(one=tmp_path / "a", other=tmp_path / "b")
    path.write_text(text.replace("2027", "2026"))
    with pytest.raises(ConfigError, match="datasets lists '2026' twice"):
        load_owner(path)
    for was, is_now in (('"2026"', '"a b"'), ("2.0", "0.0"), ("name = ", "nmae = ")):
        path.write_text(text.replace(was, is_now, 1))
        with pytest.raises(ConfigError, match="datasets"):
            load_owner(path)


def test_errors_name_the_owners_file_as_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "anna.toml"
    path.write_text(f'max_epsilon = 1.0\nmax_round_steps = 3\ntasks = ["{"0" * 64}"]\n')
    owner = load_owner(path)
    with pytest.raises(PrivacyError, match=r"^anna\.toml: max_epsilon = 1"):
        tighten(RunConfig(name="r", task="task.py"), owner)
    with pytest.raises(OwnerLimit, match=r"but anna\.toml has max_round_steps = 3\."):
        bounds_of(owner).admit(4)
    assert "file" not in owner.model_dump()
    path.write_text('file = "x"\n')
    with pytest.raises(ConfigError, match="unknown key 'file'"):
        load_owner(path)
