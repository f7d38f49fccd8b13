"""``fedcore privacy VERB``: the verbs come from the entry-point group ``fedcore.privacy``.

The device package provides verbs that inspect a ledger, the server package those that plan and
audit; this package imports neither.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from fedcore.cli import group

_installed = sorted(entry_points(group="fedcore.privacy"), key=lambda entry: entry.name)
privacy = group(
    {entry.name: entry.load() for entry in _installed},
    help="plan a privacy budget, show what was spent, and audit the mechanism",
)
