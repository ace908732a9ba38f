"""Measure models, and compare a sparse one with its dense baseline."""
