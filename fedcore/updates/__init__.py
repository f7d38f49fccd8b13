"""Messages between server and client: one file per step, with encoder and decoder together."""
