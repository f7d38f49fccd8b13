"""A device: fetch, verify, store and serve released models. Nothing here imports torch."""
