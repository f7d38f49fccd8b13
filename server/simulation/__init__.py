"""Many virtual clients on one machine, behind the same apps as a deployment."""
