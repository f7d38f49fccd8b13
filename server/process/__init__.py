"""Processes as the operating system sees them: signals, parents, memory, how one is started."""
