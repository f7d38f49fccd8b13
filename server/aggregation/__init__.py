"""From updates to a new global model."""
