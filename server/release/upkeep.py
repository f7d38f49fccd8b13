"""Upkeep of a repository's files: check all, and remove what no metadata names."""

from __future__ import annotations

from pathlib import Path

from server.release.registry import repository as registry
from server.release.registry.keys import read_trusted_root


def verify_files(repository: Path, keys: Path) -> int:
    """Checks every file that metadata in force names; returns their number.

    Raises:
        ReleaseError: the metadata does not verify, or a file is missing or differs.
    """
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        infos = [*state.releases.targets.values(), *state.targets.targets.values()]
        for info in infos:
            registry.read_info(repository, info)
        return len(infos)


def collect_garbage(repository: Path, keys: Path) -> int:
    """Removes files in ``targets`` that no metadata in force names; returns the bytes freed.

    Interrupted publications and withdrawals leave such files.

    Raises:
        ReleaseError: the metadata does not verify; nothing is removed.
    """
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        infos = [*state.releases.targets.values(), *state.targets.targets.values()]
        kept = {repository / "targets" / info.get_prefixed_paths()[0] for info in infos}
        freed_bytes = 0
        for path in (repository / "targets").rglob("*"):
            if path not in kept and not path.is_dir():
                freed_bytes += path.lstat().st_size
                path.unlink()
        return freed_bytes
