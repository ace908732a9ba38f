"""Panels of the report, one per question: each is a function from a trace or a measurement to a `Panel`."""
