"""What a run says while it runs: events, and the sinks that show or keep them."""
