"""The cloud: rounds, fine-tuning, compression, release, simulation."""
