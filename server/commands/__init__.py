"""Subcommands ``simulate``, ``check``, ``release`` and ``runs``: thin clients of `server.api`.

Start with `simulate_command`. torch is imported only when a command that needs it runs.
"""

from server.commands.check_command import check
from server.commands.release_commands import release
from server.commands.runs_command import runs
from server.commands.simulate_command import simulate

__all__ = ["check", "release", "runs", "simulate"]
