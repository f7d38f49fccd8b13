"""Keys, certificates, envelopes and sealing: thin over `cryptography`."""
