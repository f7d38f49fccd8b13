"""Whether a run that was disturbed came to what it should."""

from __future__ import annotations

from typing import Any

from tests.campaign.site import NAMES


def compare(
    found: dict[str, Any], rounds: int, expected: dict[str, Any] | None, whole: bool
) -> list[str]:
    """What is wrong with a run's result; empty where it is what it should be.

    Args:
        found: As `Site.result` gives it.
        rounds: How many the run has.
        expected: The result of an undisturbed run; None where the two need not be the same.
        whole: Whether every device must have had its part in every round.
    """
    wrong = []
    numbers = [one["round"] for one in found["rounds"]]
    if numbers != list(range(1, rounds + 1)):
        wrong.append(f"rounds {numbers}: one was lost, or counted twice")
    for one in found["rounds"]:
        enough = one["updates"] == len(NAMES) if whole else 0 < one["updates"] <= len(NAMES)
        if not enough or one["failed"]:
            wrong.append(f"round {one['round']}: {one['updates']} updates, {one['failed']} failed")
    for name, charged in found["charged"].items():
        if whole and not set(range(1, rounds + 1)) <= set(charged):
            wrong.append(f"{name}: its ledger lacks rounds: {charged}")
    counted = sum(one["updates"] for one in found["rounds"])
    if found["charged"] and counted > sum(map(len, found["charged"].values())):
        wrong.append(f"{counted} updates were counted, and fewer were charged")
    if expected is None:
        return wrong
    if found["model"] != expected["model"]:
        wrong.append("the model's bits differ from those of an undisturbed run")
    metrics = [[one["metrics"] for one in result["rounds"]] for result in (found, expected)]
    if metrics[0] != metrics[1]:
        wrong.append("metrics differ from those of an undisturbed run")
    return wrong


def extra_charges(found: dict[str, Any], rounds: int) -> int:
    """How many charges devices made beyond one for each round."""
    return sum(max(len(charged) - rounds, 0) for charged in found["charged"].values())
