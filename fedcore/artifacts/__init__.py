"""What a released model contains, and how it is checked. Nothing here imports torch."""
