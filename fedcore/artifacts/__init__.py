"""The contents of a released model, and checks on them. Does not import torch."""
