"""Whatever is moved, copied, renamed, removed or put back: no more than the owner's budget leaves.

A release here is what a device does up to the moment before a reply leaves: open the ledger, charge
it and all its copies, keep the reply. What any copy of the device has released counts.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.device_folder import lock_device_folder
from edge_client.ledger.book import LEDGER, MARK, count_path
from edge_client.ledger.ledger import DeviceLedger
from fedcore.config.owner import DataSet, OwnerPolicy, tighten
from fedcore.config.run import Privacy, RunConfig
from fedcore.errors import BudgetExhausted, PrivacyError
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.ledger import Ledger, charge, ledger_in, put_ledger

ROUND = Charge(1, 1.0, 1 / 3, 3)
DELTA = 1e-5
THREE, FOUR = (
    epsilon_of([ROUND] * count, target_delta=DELTA, accountant="rdp") for count in (3, 4)
)
BUDGET = (THREE + FOUR) / 2
"""Three rounds, and not four."""
PRIVACY = Privacy(
    unit="example", max_epsilon=1e6, target_delta=DELTA, noise_multiplier=1.0, accountant="rdp"
)


class Lab:
    """A machine with one device on it, and an owner who allows three rounds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.owner = OwnerPolicy(max_epsilon=BUDGET)
        self.kit, self.state, self.data = root / "kit", root / "state", root / "data"
        self.environ = {"XDG_STATE_HOME": str(root / "counts")}
        for folder in (self.kit, self.state, self.data):
            folder.mkdir(parents=True)
        (self.data / "wards.csv").write_text("1,2\n")
        self.released: list[Charge] = []
        self.refusals: list[str] = []
        self._keys = itertools.count()

    def train(self, run: str = "one", times: int = 1, *, dies: bool = False) -> int:
        """Rounds that leave the device; it goes on until it is refused, or ``times``."""
        left = 0
        while left < times and self._round(run, dies):
            left += not dies
            if dies:
                return 0
        return left

    def _round(self, run: str, dies: bool) -> bool:
        config = RunConfig(name=run, task="task.py", privacy=PRIVACY)
        counted = count_path(b"key", self.environ)
        with lock_device_folder(self.state) as folder:
            ledger = DeviceLedger(folder, self.kit / MARK, counted, config, self.owner, self.data)
            state, owner = folder.state(run), self.owner.on(self.data)
            try:
                others = ledger.open(state)
                before = ledger_in(state)
                privacy = tighten(config, owner).privacy
                new = Charge(len(before.charges) + 1, 1.0, 1 / 3, 3)
                after = charge(before, new, privacy, client="a", owner=owner, others=others)
                put_ledger(state, after)
                if dies:
                    with patch.object(DeviceLedger, "_repair", side_effect=KeyboardInterrupt):
                        ledger.commit(state)
                ledger.commit(state)
                folder.store_reply(run, state, f"key{next(self._keys)}", RecordDict())
            except KeyboardInterrupt:
                return True
            except (BudgetExhausted, PrivacyError) as error:
                self.refusals.append(str(error))
                return False
        self.released.append(new)
        return True

    @property
    def spent(self) -> float:
        return epsilon_of(self.released, target_delta=DELTA, accountant="rdp")

    def backup(self, name: str) -> None:
        for folder in (self.kit, self.state):
            shutil.rmtree(self.root / name / folder.name, ignore_errors=True)
            shutil.copytree(folder, self.root / name / folder.name)

    def restore(self, name: str, *folders: Path) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.root / name / folder.name, folder)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def moved(lab: Lab) -> None:
    lab.data = lab.data.rename(lab.root / "moved")


def copied(lab: Lab) -> None:
    lab.data = Path(shutil.copytree(lab.data, lab.root / "copied"))


def linked(lab: Lab) -> None:
    (lab.root / "link").symlink_to(lab.data)
    lab.data = lab.root / "link"


def file_renamed(lab: Lab) -> None:
    (lab.data / "wards.csv").rename(lab.data / "patients.csv")


def state_back(lab: Lab) -> None:
    lab.restore("first", lab.state)


def kit_back(lab: Lab) -> None:
    lab.restore("first", lab.kit)


def both_back(lab: Lab) -> None:
    lab.restore("first", lab.state, lab.kit)


def copy_gone(lab: Lab) -> None:
    (lab.state / LEDGER).unlink()


def mark_gone(lab: Lab) -> None:
    (lab.kit / MARK).unlink()


def all_but_the_count_gone(lab: Lab) -> None:
    (lab.kit / MARK).unlink()
    shutil.rmtree(lab.state)


def state_elsewhere(lab: Lab) -> None:
    lab.state = lab.root / "another state"


def all_elsewhere(lab: Lab) -> None:
    lab.state, lab.kit = lab.root / "another state", lab.root / "another kit"
    lab.kit.mkdir()


def count_gone(lab: Lab) -> None:
    shutil.rmtree(lab.root / "counts")


def count_and_state_back(lab: Lab) -> None:
    shutil.rmtree(lab.root / "counts")
    lab.restore("first", lab.state)


def no_place_to_count(lab: Lab) -> None:
    lab.environ = {}
    lab.restore("first", lab.state)


MISHAPS: list[Callable[[Lab], None]] = [
    moved,
    copied,
    linked,
    file_renamed,
    state_back,
    kit_back,
    both_back,
    copy_gone,
    mark_gone,
    all_but_the_count_gone,
    state_elsewhere,
    all_elsewhere,
    count_gone,
    count_and_state_back,
    no_place_to_count,
]


@pytest.mark.parametrize("mishap", MISHAPS, ids=lambda mishap: mishap.__name__)
@pytest.mark.parametrize("names", [("one",), ("two", "three")], ids=["same run", "run renamed"])
def test_a_mishap_gives_no_budget_back(
    lab: Lab, mishap: Callable[[Lab], None], names: tuple[str, ...]
) -> None:
    assert lab.train("one") == 1
    lab.backup("first")
    assert lab.train("one") == 1
    mishap(lab)
    for run in names:
        lab.train(run, 16)
    assert lab.spent <= BUDGET
    assert len(lab.refusals) == len(names), "each ended with a typed refusal"
    mends = mishap not in (
        *(state_back, both_back, all_but_the_count_gone, state_elsewhere, all_elsewhere),
        *(count_and_state_back, no_place_to_count),
    )
    assert len(lab.released) == (3 if mends else 2), "what can be mended is, and goes on"


def test_the_audits_four_paths_give_one_budget(lab: Lab) -> None:
    """What was measured before: the same data under four paths, and twice the budget spent."""
    for number in range(4):
        lab.data = Path(shutil.copytree(lab.data, lab.root / f"path-{number}"))
        lab.train(f"run-{number}", 16)
    assert len(lab.released) == 3


def test_a_device_that_is_copied_whole_goes_on_in_one_copy_alone(lab: Lab) -> None:
    lab.train("one")
    lab.backup("twin")
    twin = Lab(lab.root / "elsewhere")
    twin.environ = lab.environ
    shutil.copytree(lab.root / "twin" / "kit", twin.kit, dirs_exist_ok=True)
    shutil.copytree(lab.root / "twin" / "state", twin.state, dirs_exist_ok=True)
    assert lab.train("one") == 1
    assert twin.train("two", 16) == 0
    assert "ledger.count says that 2 were made" in twin.refusals[0]
    assert lab.train("one", 16) == 1


def test_two_copies_at_as_many_charges_are_told_apart(lab: Lab) -> None:
    """The first dies with a charge on disk that it has not counted; the second makes another."""
    lab.train("one")
    lab.backup("twin")
    lab.train("one", dies=True)
    twin = Lab(lab.root / "elsewhere")
    twin.environ = lab.environ
    shutil.copytree(lab.root / "twin" / "kit", twin.kit, dirs_exist_ok=True)
    shutil.copytree(lab.root / "twin" / "state", twin.state, dirs_exist_ok=True)
    assert twin.train("one") == 1
    assert lab.train("one", 16) == 0
    assert "a second copy of this device has trained meanwhile" in lab.refusals[0]
    assert len(lab.released) + len(twin.released) == 2


def test_a_copy_that_trains_while_a_round_goes_on_is_noticed_before_anything_leaves(
    lab: Lab,
) -> None:
    config = RunConfig(name="one", task="task.py", privacy=PRIVACY)
    lab.train("one")
    lab.backup("twin")
    with lock_device_folder(lab.state) as folder:
        counted = count_path(b"key", lab.environ)
        ledger = DeviceLedger(folder, lab.kit / MARK, counted, config, lab.owner, lab.data)
        state = folder.state("one")
        ledger.open(state)
        twin = Lab(lab.root / "elsewhere")
        twin.environ = lab.environ
        shutil.copytree(lab.root / "twin" / "kit", twin.kit, dirs_exist_ok=True)
        shutil.copytree(lab.root / "twin" / "state", twin.state, dirs_exist_ok=True)
        assert twin.train("one") == 1
        put_ledger(state, Ledger((*ledger_in(state).charges, ROUND)))
        with pytest.raises(PrivacyError, match="a second copy of this device"):
            ledger.commit(state)


OPERATIONS = {
    "train": lambda lab: lab.train("one"),
    "train another": lambda lab: lab.train("two"),
    "die": lambda lab: lab.train("one", dies=True),
    "back up": lambda lab: lab.backup("first"),
    "state back": state_back,
    "kit back": kit_back,
    "both back": both_back,
    "copy gone": lambda lab: (lab.state / LEDGER).unlink(missing_ok=True),
    "mark gone": lambda lab: (lab.kit / MARK).unlink(missing_ok=True),
    "state gone": lambda lab: shutil.rmtree(lab.state) or lab.state.mkdir(),  # type: ignore[func-returns-value]
    "data copied": lambda lab: (
        shutil.copytree(lab.data, lab.data / "more", dirs_exist_ok=True)
        if not (lab.data / "more").exists()
        else None
    ),
}


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=4, max_size=14))
def test_no_history_of_mishaps_releases_more_than_the_budget(
    tmp_path_factory: pytest.TempPathFactory, history: list[str]
) -> None:
    """As long as the count on the machine is left alone."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.backup("first")
    for name in history:
        OPERATIONS[name](lab)
    lab.train("three", 16)
    assert lab.spent <= BUDGET


def named(lab: Lab, *names: str, budgets: dict[str, float] | None = None) -> None:
    """The owner names data sets, each a folder with a file of its own."""
    own_budgets = budgets or {}
    for name in names:
        (lab.root / name).mkdir(exist_ok=True)
        if not list((lab.root / name).iterdir()):
            (lab.root / name / "file").write_text(f"of {name}")
    datasets = tuple(
        DataSet(name=name, path=str(lab.root / name), max_epsilon=own_budgets.get(name))
        for name in names
    )
    lab.owner = OwnerPolicy(max_epsilon=BUDGET, datasets=datasets)


def on(lab: Lab, name: str, run: str = "one") -> int:
    lab.data = lab.root / name
    return lab.train(run, 16)


def test_data_that_the_owner_names_have_budgets_of_their_own(lab: Lab) -> None:
    named(lab, "2026", "2027", budgets={"2027": FOUR * 1.001})
    assert on(lab, "2026") == 3
    assert on(lab, "2027", "two") == 4
    assert on(lab, "2026", "again") == on(lab, "2027", "more") == 0
    (lab.root / "data-without-a-name").mkdir()
    assert on(lab, "data-without-a-name") == 0, "all counts there"


def test_what_was_trained_without_a_name_counts_against_every_name(lab: Lab) -> None:
    assert lab.train("one") == 1
    named(lab, "2026")
    assert on(lab, "2026", "two") == 2


@pytest.mark.parametrize(
    "how",
    [
        lambda one, other: shutil.copy(one, other / "under another name"),
        lambda one, other: one.rename(other / "moved"),
        lambda one, other: (other / "link").symlink_to(one),
        lambda one, other: (other / "link").hardlink_to(one),
        lambda one, other: (other / "folder").symlink_to(one.parent),
        lambda one, other: (other / "below").mkdir() or shutil.copy(one, other / "below"),
    ],
    ids=["copied", "moved", "symlinked", "hard-linked", "folder linked", "deeper"],
)
def test_names_that_share_a_file_are_one(lab: Lab, how: Callable[[Path, Path], object]) -> None:
    named(lab, "2026", "2027")
    assert on(lab, "2026") == 3
    how(lab.root / "2026" / "file", lab.root / "2027")
    assert on(lab, "2027", "two") == 0
    assert len(lab.released) == 3


def test_a_name_keeps_what_was_spent_whatever_becomes_of_its_files(lab: Lab) -> None:
    named(lab, "2026", "2027")
    lab.data = lab.root / "2026"
    assert lab.train("one") == 1
    (lab.root / "2026" / "file").write_text("grown")
    assert lab.train("two") == 1
    shutil.rmtree(lab.root / "2026")
    (lab.root / "2026").mkdir()
    (lab.root / "2026" / "other").write_text("all new")
    assert lab.train("three", 16) == 1
    (lab.root / "2027" / "file").write_text("grown")  # what 2026 once was
    assert on(lab, "2027", "four") == 0


def test_a_data_set_that_cannot_be_told_counts_against_all(lab: Lab) -> None:
    named(lab, "2026", "2027")
    assert on(lab, "2026") == 3
    (lab.state / "contents.json").unlink()
    assert on(lab, "2027", "two") == 0
    (lab.root / "2027" / "file").unlink()
    assert on(lab, "2027", "three") == 0


def test_the_least_budget_of_names_that_are_one_holds(lab: Lab) -> None:
    named(lab, "2026", "2027", budgets={"2026": 1000.0})
    shutil.copy(lab.root / "2026" / "file", lab.root / "2027" / "file")
    lab.data = lab.root / "2027"
    assert lab.train("one") == 1
    assert on(lab, "2026", "two") == 2


def test_a_data_set_that_is_too_large_to_look_at_is_refused(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(lab, "2026")
    monkeypatch.setattr("edge_client.ledger.contents.MAX_BYTES", 3)
    assert on(lab, "2026") == 0
    assert "too many to compare with other data sets" in lab.refusals[0]
