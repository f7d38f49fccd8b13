"""A device that takes part in training: one warm process that the server wakes."""
