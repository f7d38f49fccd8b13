"""Differential privacy: what is spent, what may be spent, and what cannot be protected."""
