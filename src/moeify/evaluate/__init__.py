"""Measuring models, and comparing a sparse one with its dense baseline."""
