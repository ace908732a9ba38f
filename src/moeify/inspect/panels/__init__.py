"""Panels of the report, one question each: a function of a trace or of a measurement gives a `Panel`."""
