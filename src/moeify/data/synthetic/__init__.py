"""Synthetic data for tasks whose real data would have to be downloaded; results on them say nothing about real ones."""

from moeify.data.synthetic.errands import errands
from moeify.data.synthetic.melodies import melodies
from moeify.data.synthetic.numerals import numerals
from moeify.data.synthetic.shapes import shapes
from moeify.data.synthetic.strokes import strokes
from moeify.data.synthetic.two_tasks import two_tasks

__all__ = ["errands", "melodies", "numerals", "shapes", "strokes", "two_tasks"]
