"""Checkpoints of a training run: written atomically, checked before they are read, and without pickle."""
