"""Subcommands ``simulate``, ``check`` and ``release``: thin clients of `server.api`.

Start with `simulate_command`. torch is imported only when a command that needs it runs.
"""

from server.commands.check_command import check
from server.commands.release_commands import release
from server.commands.simulate_command import simulate

__all__ = ["check", "release", "simulate"]
