"""``fedcore privacy VERB``: verbs come from the entry-point group ``fedcore.privacy``.

Devices bring those that look at a ledger, servers those that plan and audit; this package imports
neither.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from fedcore.cli import group

_installed = sorted(entry_points(group="fedcore.privacy"), key=lambda entry: entry.name)
privacy = group(
    {entry.name: entry.load() for entry in _installed},
    help="plan a privacy budget, look at what was spent, and audit the mechanism",
)
