"""Key rotation: new keys for roles, authorised by the old ones, and rollback after a theft."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
    TOP_LEVEL_ROLE_NAMES,
    Delegations,
    Key,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
)

from fedcore.artifacts.statements import EPOCHS, Epochs, parse_epochs, stamp
from fedcore.errors import ReleaseError, TrustError
from fedcore.files import write_atomic
from server.release.registry import pending
from server.release.registry import repository as registry
from server.release.registry.keys import (
    ROLES,
    TRUSTED_ROOT,
    Keys,
    Quorum,
    add_keys,
    generate_keys,
    key_files,
    read_key,
    read_keys,
    read_trusted_root,
    remove_files,
)


@dataclass(frozen=True)
class Rotation:
    """The result of a rotation.

    Example::

        done = fedcore.rotate_keys("releases", "keys", roles=["online"])
        done.removed  # files of retired keys: destroy every copy of them
    """

    root_version: int
    """Version of the root now in force."""
    roles: tuple[str, ...]
    """Roles with new keys."""
    written: tuple[Path, ...]
    """Files of the new keys."""
    removed: tuple[Path, ...]
    """Removed files of retired keys; copies elsewhere must be destroyed."""
    epochs: Mapping[str, int]
    """New epoch of each model that was rolled back."""


def rotate(
    repository: Path,
    keys: Path,
    *,
    roles: Collection[str],
    quorums: Mapping[str, Quorum] | None = None,
    last_good: Mapping[str, int] | None = None,
    now: datetime,
) -> Rotation:
    """Replaces the keys of roles, and withdraws releases after a model's last good version.

    Devices follow from any earlier root. With new keys of timestamp or snapshot, devices discard
    what the old keys signed, so that a thief can't block the owner's versions. A model that is
    rolled back starts a new epoch, whose versions supersede all earlier epochs; only the offline
    keys can start one.

    Args:
        repository: The folder of the repository; restore a copy first if a thief may have written
            to it.
        keys: The folder of keys. Required: old keys of root and of every role that isn't replaced,
            as many as their thresholds. All others may be lost.
        roles: Roles whose keys are all replaced.
        quorums: New number of keys and threshold by replaced role; unchanged by default.
        last_good: By model, the version to which devices return.
        now: Time from which expiry is counted; UTC.

    Returns:
        The rotation now in force. ``root.json`` in the folder of keys is the new root.

    Raises:
        ReleaseError: keys are missing or not the repository's, or a version doesn't exist. Nothing
            changes.
        DiskFull: the disk is full. Nothing changes.
    """
    quorums, last_good = quorums or {}, last_good or {}
    if unknown := sorted({*roles, *quorums} - set(ROLES)):
        raise ReleaseError(
            f"role {unknown[0]!r}: expected one of {', '.join(ROLES)}. Nothing was changed."
        )
    if idle := sorted(set(quorums) - set(roles)):
        raise ReleaseError(
            f"role {idle[0]!r}: a threshold is given, but its keys are not to be replaced. "
            "Nothing was changed; pass the role with --role, too."
        )
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        numbers = {role: quorums.get(role) or _quorum(state, role) for role in ROLES}
        kept = _trusted_old_keys(state, keys, set(ROLES) - set(roles), repository)
        fresh = generate_keys([role for role in ROLES if role in roles], numbers)
        signing = Keys({**kept.signers, **fresh.signers})
        rooted = bool(TOP_LEVEL_ROLE_NAMES & set(roles))
        root = _root(state, signing, numbers, now) if rooted else state.root
        targets = _targets(state, signing, numbers["releases"], now)
        files, releases, epochs = _rolled_back(repository, state, targets, last_good, now)
        before = [_trusted_old_keys(state, keys, ["root"], repository)] if "root" in roles else []
        raw_root = registry.sign(root, signing, "root", *before) if rooted else None
        written = add_keys(fresh, keys)
        try:
            registry.replace(
                repository,
                signing,
                {"targets": targets, "releases": releases},
                files,
                snapshot=Snapshot(
                    version=state.snapshot.version + 1,
                    expires=now + registry.RELEASES_EXPIRY,
                    meta=dict(state.snapshot.meta),
                ),
                timestamp_version=state.timestamp.version + 1,
                now=now,
                root=None if raw_root is None else (root.version, raw_root),
            )
        except BaseException:
            if not _in_force(repository, keys, fresh):
                remove_files(written)
            raise
        if raw_root is not None:
            write_atomic(keys / TRUSTED_ROOT, raw_root)
        removed = _retired(keys, roles, signing)
        remove_files(removed)
        return Rotation(
            root.version,
            tuple(role for role in ROLES if role in roles),
            tuple(written),
            tuple(removed),
            {model: epochs.of(model) for model in last_good},
        )


def _quorum(state: registry.RepositoryState, role: str) -> Quorum:
    """Returns a role's current number of keys and threshold."""
    delegator = state.targets if role == "releases" else state.root
    required = delegator.get_delegated_role(role)
    return Quorum(required.threshold, len(required.keyids))


def _trusted_old_keys(
    state: registry.RepositoryState, keys: Path, roles: Iterable[str], repository: Path
) -> Keys:
    """Returns the trusted old keys of some roles, in the order of `ROLES`."""
    wanted = set(roles)
    needed = [role for role in ROLES if role in wanted]
    return registry.trusted_keys(state, read_keys(keys, needed), repository)


def _root(
    state: registry.RepositoryState, signing: Keys, numbers: Mapping[str, Quorum], now: datetime
) -> Root:
    """Builds the next root; roles that aren't replaced keep all of their keys."""
    root = Root.from_dict(state.root.to_dict())
    root.version, root.expires = state.root.version + 1, now + registry.OFFLINE_EXPIRY
    root.unrecognized_fields |= stamp(now)
    for role in sorted(TOP_LEVEL_ROLE_NAMES):
        new = {key.keyid: key for key in signing.public(role)}
        if set(new) <= set(state.root.roles[role].keyids):
            continue  # not replaced
        root.roles[role] = Role(list(new), numbers[role].threshold)
        root.keys |= new
    used = {keyid for role in root.roles.values() for keyid in role.keyids}
    root.keys = {keyid: key for keyid, key in root.keys.items() if keyid in used}
    return root


def _targets(
    state: registry.RepositoryState, signing: Keys, quorum: Quorum, now: datetime
) -> Targets:
    """Builds the next targets metadata, which delegates releases to the new keys."""
    targets = Targets.from_dict(state.targets.to_dict())
    targets.version, targets.expires = targets.version + 1, now + registry.OFFLINE_EXPIRY
    role = targets.get_delegated_role("releases")
    by_id: dict[str, Key] = {key.keyid: key for key in signing.public("releases")}
    if not set(by_id) <= set(role.keyids):
        role.keyids, role.threshold = list(by_id), quorum.threshold
        assert targets.delegations is not None
        targets.delegations = Delegations(keys=by_id, roles=targets.delegations.roles)
    return targets


def _rolled_back(
    repository: Path,
    state: registry.RepositoryState,
    targets: Targets,
    last_good: Mapping[str, int],
    now: datetime,
) -> tuple[dict[str, bytes], Targets, Epochs]:
    """Returns files to write, the remaining releases, and epochs; adds epochs to ``targets``.

    Raises:
        ReleaseError: a version to return to was never published, or is damaged.
    """
    epochs = read_epochs(repository, state)
    published = dict(state.releases.targets)
    files = dict[str, bytes]()
    for model, version in last_good.items():
        manifest = f"models/{model}/{version}/manifest.json"
        if manifest not in published:
            raise ReleaseError(
                f"{model}: there is no version {version} to return to. Nothing was changed; list "
                "the published versions with `fedcore release list`."
            )
        # Everything later is withdrawn; what remains must be complete.
        for name in registry.RELEASE_FILES:
            path = f"models/{model}/{version}/{name}"
            registry.read_target(repository, state, path)
        raw = registry.read_target(repository, state, manifest)
        published = {
            path: info for path, info in published.items() if _is_kept(path, model, version)
        }
        pointer = TargetFile.from_data(f"models/{model}/{registry.POINTER}", raw, ["sha256"])
        published[pointer.path] = pointer
        files[f"targets/{pointer.get_prefixed_paths()[0]}"] = raw
        epochs = epochs.after(model)
    if last_good:
        raw = epochs.to_bytes()
        info = TargetFile.from_data(EPOCHS, raw, ["sha256"])
        targets.targets[EPOCHS] = info
        files[f"targets/{info.get_prefixed_paths()[0]}"] = raw
    releases = Targets(
        version=state.releases.version + 1,
        expires=now + registry.RELEASES_EXPIRY,
        targets=published,
    )
    return files, releases, epochs


def read_epochs(repository: Path, state: registry.RepositoryState) -> Epochs:
    """Reads the epochs in force; empty if no model was ever rolled back.

    Raises:
        ReleaseError: the file is missing or damaged.
    """
    if (info := state.targets.targets.get(EPOCHS)) is None:
        return Epochs()
    try:
        return parse_epochs(registry.read_info(repository, info))
    except TrustError as error:
        raise ReleaseError(f"{repository}: {error} Restore it from a copy.") from error


def _is_kept(path: str, model: str, version: int) -> bool:
    """Returns whether a file stays when a model is rolled back; unknown paths come from a thief."""
    found = registry.release_of(path)
    if found is None:
        return registry.is_pointer(path)
    return found[0] != model or found[1] <= version


def _in_force(repository: Path, keys: Path, fresh: Keys) -> bool:
    """Returns whether new keys are in force despite an interruption."""
    if pending.is_pending(repository):
        return True
    state = registry.read_state(repository, read_trusted_root(keys))
    delegators = {role: state.targets if role == "releases" else state.root for role in ROLES}
    return any(
        set(fresh.ids(role)) & set(delegators[role].get_delegated_role(role).keyids)
        for role in fresh.signers
    )


def _retired(keys: Path, roles: Iterable[str], signing: Keys) -> list[Path]:
    """Returns the files of retired keys; unreadable files stay."""
    found = []
    for role in roles:
        for path in key_files(keys, role):
            try:
                keyid = read_key(path, role).public_key.keyid
            except ReleaseError:
                continue
            if keyid not in signing.ids(role):
                found.append(path)
    return found
