"""Channels of a model: give a canary to all devices, or end its trial.

Devices never go back to a lower version. A trial that ends badly is therefore followed by the
stable version's bytes under a new number, for the devices of the trial alone.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.rollout import Canary, Rollout
from fedcore.errors import ReleaseError
from server.release.publish import draft_again, publishing, read_rollout, versions
from server.release.registry import repository as registry
from server.release.registry.keys import read_trusted_root


def rollouts(repository: Path, keys: Path) -> dict[str, tuple[int, Rollout]]:
    """Returns the stable version and the rollout of each model, verified.

    Raises:
        ReleaseError: there is no repository, or its signatures don't verify.
    """
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        models = sorted({model for model, _, _ in registry.releases(state)})
        return {
            model: (stable_version(state, model), read_rollout(state, model)) for model in models
        }


def stable_version(state: registry.RepositoryState, model: str) -> int:
    """Returns the version for devices that are in no trial: the one with the pointer's digest."""
    pointer = state.releases.targets[f"models/{model}/{registry.POINTER}"]
    for version in reversed(versions(state, model)):
        manifest = state.releases.targets[f"models/{model}/{version}/manifest.json"]
        if manifest.hashes == pointer.hashes:
            return version
    raise ReleaseError(
        f"{model}: its pointer names no published version. Nothing was changed; restore the "
        "repository from a copy."
    )


def promote(model: str, *, repository: Path, keys: Path, now: datetime) -> Manifest:
    """Gives the canary of a model to all devices.

    Raises:
        ReleaseError: there is no canary, or keys are missing or not the repository's.
        DiskFull: the disk is full; the trial goes on.
    """
    with publishing(repository, keys, model, now) as (state, put):
        return put(None, _canary(read_rollout(state, model), model).version, None)


def end_trial(
    model: str,
    why: str,
    *,
    repository: Path,
    keys: Path,
    now: datetime,
    version: int | None = None,
) -> Manifest | None:
    """Rolls the canary of a model back: its devices get the stable version's bytes again.

    Args:
        model: The model's name.
        why: The reason, which is signed and shown.
        repository: The folder of the repository.
        keys: The folder of its online keys.
        now: Time of publication.
        version: The version whose trial ends; the one that is on trial when None.

    Returns:
        The manifest of the new version; None if another version is on trial.

    Raises:
        ReleaseError: there is no canary, or keys are missing or not the repository's.
        DiskFull: the disk is full; the trial goes on.
    """
    with publishing(repository, keys, model, now) as (state, put):
        rollout = read_rollout(state, model)
        canary = _canary(rollout, model)
        if version not in (None, canary.version):
            return None
        draft = draft_again(repository, state, model, stable_version(state, model))
        following = versions(state, model)[-1] + 1
        after = Rollout(
            canary=canary.model_copy(update={"version": following}),
            rolled_back=rollout.ended_badly(canary.version, why),
        )
        return put(draft, following, after)


def _canary(rollout: Rollout, model: str) -> Canary:
    if rollout.canary is None:
        raise ReleaseError(
            f"{model}: no version is on trial. Nothing was changed; `fedcore release show` tells "
            "which versions devices get."
        )
    return rollout.canary
