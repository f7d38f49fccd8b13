"""``owner.toml``: limits that a device's owner sets; the device reads them and tightens each run.

`load_owner` reads the file into an `OwnerPolicy`; `tighten` applies it to a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from fedcore.config.patterns import DATA_NAME, HOURS, PATH, SHA256
from fedcore.config.run import DeviceChoice, RunConfig
from fedcore.config.section import MAX_SECONDS, Section
from fedcore.config.settings import load
from fedcore.errors import ConfigError, PrivacyError

Hours = Annotated[str, Field(pattern=HOURS)]
Digest = Annotated[str, Field(pattern=SHA256)]


class DataSet(Section):
    """``[[datasets]]``: data with a budget of its own, because it is about other people."""

    name: Annotated[str, Field(pattern=DATA_NAME)]
    """All training on data of this name adds up permanently, however the files change."""
    path: Annotated[str, Field(pattern=PATH)]
    """The folder of the data set. A run counts here when ``data`` is this folder or inside it."""
    max_epsilon: Annotated[float, Field(ge=0.01, le=1e6)] | None = None
    """The budget of this data set, in place of the device's."""

    @property
    def folder(self) -> Path:
        """The absolute path of the data folder."""
        return Path(self.path).resolve()


class OwnerPolicy(Section):
    """``owner.toml``: limits that no server can lift."""

    data: str | None = None
    """Folder of the local data, which the task reads from; it must exist."""
    max_epsilon: Annotated[float, Field(ge=0.01, le=1e6)] | None = None
    """Budget of this device over all runs, tasks and data, whatever the server allows; no update
    that would exceed it leaves. For data named in ``datasets``: over all runs on that data set."""
    target_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The delta at which ``max_epsilon`` is counted, when stricter than the server's."""
    max_delta_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Upper bound of a run's ``target_delta`` times the number of examples. At 1, publishing one
    example would count as private."""
    max_memory_bytes: Annotated[int, Field(ge=1, le=10**18)] | None = None
    """A larger message, or training that would need more, is declined before it starts. Training
    without privacy that turns out to need more ends between two steps."""
    max_round_s: Annotated[float, Field(ge=1, le=MAX_SECONDS)] | None = None
    """Most seconds of work for one message. Private training that would take longer, judged by a
    step timed on synthetic examples, is declined before it starts. Work that takes longer ends
    between two steps, and no update is sent."""
    max_round_steps: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """Most steps of the optimiser in one round; a round that asks for more is declined."""
    max_round_bytes: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Most bytes of one message from the server. In any case no message may have more than a few
    times the bytes of the installed task's model."""
    max_threads: Annotated[int, Field(ge=1, le=2**16)] | None = None
    """Most threads of torch that training uses."""
    device: DeviceChoice | None = None
    """Where this device trains, whatever the run sets."""
    tasks: tuple[Digest, ...] | None = None
    """SHA-256 of each task file that may run here; any installed task when unset."""
    hours: tuple[Hours, ...] | None = None
    """When this device takes part, by its own clock, such as ``["22:00-06:00"]``; always when
    unset. Training that has not finished at the end of these hours is cancelled."""
    max_bandwidth_bytes_per_s: Annotated[int, Field(ge=10_000, le=10**12)] | None = None
    """Most bytes a second to and from the server in total, averaged over a whole transfer."""
    min_battery_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """On battery, this device does not take part below this charge."""
    on_mains_only: bool = False
    """This device does not take part while it runs on battery."""
    max_gpu_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of a GPU's memory that training may use. More is an out-of-memory error."""
    free_gpu_between_rounds: bool = False
    """Releases the GPU's memory after each round; the next round takes longer to begin."""
    feedback: bool = False
    """Whether ``fedcore device run`` may tell the server how a model is used here: requests, errors
    and latencies, and in which bins of the release's reference inputs and outputs fell, never an
    input or an answer. Where privacy is on, because this file sets ``max_epsilon`` or the
    model was trained with protection of examples, bins are told with ``feedback_epsilon`` alone,
    and errors and latencies are not."""
    feedback_epsilon: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Bins are told with noise: the epsilon of each row that is served here. A row is told once. It
    adds to what training spends on an example, and is not counted in ``max_epsilon``."""
    datasets: tuple[DataSet, ...] = ()
    """Two data sets that ever contained a file of the same content count as one, with the smaller
    budget. Training on data without a name counts against all of them."""

    file: str = Field(default="owner.toml", exclude=True, repr=False)
    """The file's name for errors. It excludes the folder, because some errors go to the server."""

    @field_validator("data")
    @classmethod
    def _names_a_folder(cls, data: str | None) -> str | None:
        if data is not None and (not data or "\0" in data):
            raise ValueError(
                f"data = {data!r} is not a folder name. Leave it out to use the task's own "
                "data folder."
            )
        return data

    @field_validator("hours")
    @classmethod
    def _names_hours(cls, hours: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if hours == ():
            raise ValueError(
                "hours = [] is empty, so this device would never take part. Leave it out to take "
                'part at any time, or list some hours, e.g. ["22:00-06:00"].'
            )
        return hours

    @property
    def data_folder(self) -> Path | None:
        """The folder of the local data, or None if the owner sets none."""
        return Path(self.data) if self.data else None

    def data_set(self, folder: Path | None) -> DataSet | None:
        """Returns the named data set that contains ``folder``, or None if no data set does."""
        if folder is None:
            return None
        where = folder.resolve()
        return next((one for one in self.datasets if where.is_relative_to(one.folder)), None)

    def on(self, folder: Path | None) -> OwnerPolicy:
        """Returns the policy for the data in ``folder``, with its own budget if it has one."""
        named = self.data_set(folder)
        if named is None or named.max_epsilon is None:
            return self
        return self.model_copy(update={"max_epsilon": named.max_epsilon})

    def budget(self, names: Iterable[str]) -> float | None:
        """Returns the smallest budget of the data sets with these names, or None if unlimited."""
        own = {one.name: one.max_epsilon for one in self.datasets}
        limits = [own.get(name) or self.max_epsilon for name in names]
        return min((limit for limit in limits if limit is not None), default=None)


OPEN_POLICY = OwnerPolicy()
"""The policy of an owner who adds no limit to the server's run."""


def load_owner(path: Path) -> OwnerPolicy:
    """Reads ``owner.toml``.

    Raises:
        ConfigError: the file is missing or not valid TOML, or a key or value is wrong; or ``data``
            is no folder that this user can see, or two of ``datasets`` share a name or overlap.
    """
    owner = load(path, OwnerPolicy, file=path.name)
    _check_apart(path, owner.datasets)
    folder = owner.data_folder
    if folder is not None and not _is_folder(folder):
        raise ConfigError(
            f"{path}: data = {owner.data!r}: there is no accessible folder {folder.absolute()}. "
            "Nothing was run; create it, mount it, give this user access to it, or set `data` to "
            "the folder that holds the data."
        )
    return owner


def _check_apart(path: Path, datasets: Sequence[DataSet]) -> None:
    """Rejects data sets with equal names or overlapping folders, which make budgets ambiguous."""
    for one, other in combinations(datasets, 2):
        if one.name == other.name:
            raise ConfigError(
                f"{path}: datasets lists {one.name!r} twice. Nothing was run; give each data set "
                "its own name."
            )
        if one.folder.is_relative_to(other.folder) or other.folder.is_relative_to(one.folder):
            raise ConfigError(
                f"{path}: datasets: {one.name!r} and {other.name!r} overlap ({one.path!r} and "
                f"{other.path!r}). Nothing was run; list each folder under one data set only."
            )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def tighten(run: RunConfig, owner: OwnerPolicy) -> RunConfig:
    """Returns the run with this owner's limits: never looser than either side asks for.

    Guarantee:
        ``max_epsilon`` and ``target_delta`` of the result are at most those of ``run``.

    Raises:
        PrivacyError: the owner set a budget, and the run would train without privacy.
    """
    if owner.max_epsilon is not None and not run.private:
        raise PrivacyError(
            f"{owner.file}: max_epsilon = {owner.max_epsilon:g}, and the run has privacy.unit = "
            f"{run.privacy.unit!r}, which puts no bound on what this device reveals to the "
            "server. The device does not take part and nothing was trained; the server must set "
            "privacy.unit to 'example' or 'both', or the owner must remove the budget."
        )
    noise = run.privacy.evaluation_noise_multiplier
    if run.evaluates_privately:  # by the run's budget, on all clients and the server alike
        from fedcore.privacy.evaluation_noise import evaluation_noise  # loads SciPy

        noise = evaluation_noise(run)
    privacy = run.privacy.model_copy(
        update={
            "evaluation_noise_multiplier": noise,
            "max_epsilon": min(run.privacy.max_epsilon, owner.max_epsilon or float("inf")),
            "target_delta": min(run.privacy.target_delta, owner.target_delta or 1.0),
        }
    )
    client = run.client.model_copy(update={"device": owner.device or run.client.device})
    return run.model_copy(update={"privacy": privacy, "client": client})
