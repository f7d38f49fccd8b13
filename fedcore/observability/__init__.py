"""Progress and logs of a run: events, and the sinks that show or store them."""
