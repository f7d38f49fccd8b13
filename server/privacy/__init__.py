"""What a run's privacy costs before it starts, and what an audit finds that it really is."""
