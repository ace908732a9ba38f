"""Checkpoints of a training run: written whole or not at all, checked before they are read, free of pickle."""
