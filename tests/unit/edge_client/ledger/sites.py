"""A device with charges on disk, for tests of its ledger's verbs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from flwr.app import RecordDict

from edge_client.device_folder import lock_device_folder
from edge_client.ledger.book import MARK, count_path
from edge_client.ledger.ledger import DeviceLedger
from fedcore.cli import Command
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import Privacy, RunConfig
from fedcore.crypto.keys import new_key, public_bytes, save_key
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.ledger import Ledger, ledger_in, put_ledger

DELTA = 1e-6
OWNER = f"max_epsilon = 8.0\ntarget_delta = {DELTA}\n"


class Site:
    """A device with charges on disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.kit, self.state = root, root / "kit", root / "kit" / "device"
        self.kit.mkdir()
        key = new_key()
        save_key(self.kit / "key.pem", key)
        self.public = public_bytes(key)
        self.owner = root / "owner.toml"
        self.owner.write_text(OWNER)
        counted = count_path(self.public, os.environ)
        assert counted is not None
        self.counted = counted

    def charge(self, run: str, times: int, noise: float = 1.2) -> None:
        privacy = Privacy(unit="example", max_epsilon=1e6)
        config = RunConfig(name=run, task="task.py", privacy=privacy)
        with lock_device_folder(self.state) as folder:
            ledger = DeviceLedger(
                folder, self.kit / MARK, self.counted, config, OwnerPolicy(), None
            )
            state = folder.state(run)
            ledger.open(state)
            for _ in range(times):
                before = ledger_in(state).charges
                new = Charge(len(before) + 1, noise, 1 / 10, 10)
                put_ledger(state, Ledger((*before, new)))
                ledger.commit(state)
                folder.store_reply(run, state, f"{run}{len(before)}", RecordDict())

    def files(self) -> dict[Path, bytes]:
        every = [*self.root.rglob("*"), *self.counted.parent.rglob("*")]
        return {path: path.read_bytes() for path in every if path.is_file()}

    def run(self, command: Command, *words: object) -> int:
        parser = argparse.ArgumentParser()
        command.arguments(parser)
        return command.run(parser.parse_args([str(word) for word in words]))


def epsilon(count: int, noise: float, delta: float = 1e-5, more: int = 0) -> float:
    charges = [Charge(1, noise, 0.1, 10)] * count + [Charge(1, 2.0, 0.1, 10)] * more
    return epsilon_of(charges, target_delta=delta, accountant="rdp")
