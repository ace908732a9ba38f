"""Synthetic data are the same for the same seed, and their labels follow from their inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.synthetic import melodies, numerals, shapes, two_tasks
from moeify.data.synthetic.numerals import english, german, roman
from moeify.data.synthetic.shapes import SHAPES, drawn


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, ("zero", "null")),
        (17, ("seventeen", "siebzehn")),
        (30, ("thirty", "dreißig")),
        (101, ("one hundred one", "einhunderteins")),
        (221, ("two hundred twenty-one", "zweihunderteinundzwanzig")),
        (3999, ("three thousand nine hundred ninety-nine", "dreitausendneunhundertneunundneunzig")),
        (1016, ("one thousand sixteen", "eintausendsechzehn")),
    ],
)
def test_numbers_in_words(number, words):
    assert (english(number), german(number)) == words


@given(st.integers(1, 3999))
def test_roman_numerals_add_up(number):
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[sign] for sign in roman(number)]
    after = [*values[1:], 0]
    assert sum(-v if v < w else v for v, w in zip(values, after, strict=True)) == number
    assert len(roman(number)) <= 15


def test_translations_differ_and_follow_the_seed():
    rows = numerals(300, seed=1)
    assert len({(row["source"], row["language"]) for row in rows}) == 300
    assert rows == numerals(300, seed=1) != numerals(300, seed=2)


def test_pictures_have_different_captions_and_every_shape_differs():
    pairs = shapes(100, seed=0, size=16)
    assert len({caption for _, caption in pairs}) == 100
    assert all(picture.shape == (3, 16, 16) and 0 <= picture.min() < picture.max() <= 1 for picture, _ in pairs)
    masks = [drawn(shape, 0.5, 0.5, 0.4, 64) for shape in SHAPES]
    assert all(mask.any() for mask in masks)
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_melodies_are_of_six_classes_and_follow_the_seed():
    sounds = melodies(12, seed=0)
    assert len({label for _, label in sounds}) == 6
    assert all(0.05 < sound.wave.abs().max() <= 1 for sound, _ in sounds)
    assert torch.equal(sounds[3][0].wave, melodies(12, seed=0)[3][0].wave)


def test_a_table_has_two_tasks_that_its_columns_decide():
    rows = two_tasks(2000, seed=0)
    assert rows == two_tasks(2000, seed=0)
    clicked = torch.tensor([[row["clicked"], row["bought"]] for row in rows]).float()
    assert clicked.mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.01)
    assert 0.1 < torch.corrcoef(clicked.T)[0, 1] < 0.9
    assert 0.03 < sum(row["x0"] is None for row in rows) / len(rows) < 0.07
