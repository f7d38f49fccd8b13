from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from fedcore.config.run import FederationConfig
from fedcore.crypto.issue import make_request
from fedcore.crypto.keys import new_key
from fedcore.crypto.roster import load_server_identity
from fedcore.training.roles import is_judge
from server.live.network.members import count_devices
from server.provision.issue import Act, initialise, provision_member, provision_server


def test_devices_are_counted_by_what_they_do(tmp_path: Path) -> None:
    """By their names edge-0 and edge-1 judge."""
    day = timedelta(days=1)
    act = Act(tmp_path / "authority", "anna", datetime.now(UTC).replace(microsecond=0))
    initialise(act, "orchard")
    provision_server(act, ["localhost"], port=9092, validity=day, again=False)
    for name in ("edge-0", "edge-1", "edge-2", "edge-3"):
        request = make_request(new_key(), name)
        provision_member(act, name, "device", request, where=name, validity=day, num_examples=None)
    roster = load_server_identity(act.folder / "server").roster()
    federation = FederationConfig(holdout=0.5, holdout_by="clients", evaluate_cohort=2)
    judges = partial(is_judge, federation)
    assert count_devices(roster, drained=()) == 4
    assert count_devices(roster, drained=("edge-2",)) == 3
    assert count_devices(roster, drained=(), among=judges) == 2
    assert count_devices(roster, drained=("edge-1", "edge-2"), among=judges) == 1
