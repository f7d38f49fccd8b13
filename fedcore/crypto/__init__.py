"""Keys, certificates, signed envelopes and encryption at rest: a thin layer over `cryptography`."""
