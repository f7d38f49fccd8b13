"""What a run's privacy costs before it starts (`plan_command`), and what it really is (`audit_command`)."""
