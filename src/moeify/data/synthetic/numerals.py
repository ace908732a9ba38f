"""Synthetic translations: a number in digits, and in English words, German words or Roman numerals."""

from __future__ import annotations

import random

LANGUAGES = ("en", "de", "roman")

_EN = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_EN_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DE = (
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
)  # fmt: skip
_DE_TENS = ("", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
_ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"),
    (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def numerals(count: int, seed: int) -> list[dict[str, str]]:
    """Different pairs of a number from 1 to 3999 in digits, `source`, and the same in `language`, `target`.

    Args:
        count: how many, up to three times 3,999.
        seed: of the choice.
    """
    pairs = [(number, language) for number in range(1, 4000) for language in LANGUAGES]
    chosen = random.Random(seed).sample(pairs, count)
    written = {"en": english, "de": german, "roman": roman}
    return [{"source": str(n), "target": written[language](n), "language": language} for n, language in chosen]


def english(number: int) -> str:
    """A number below 10,000 in English words, without "and"."""
    if number < 20:
        return _EN[number]
    if number < 100:
        return _EN_TENS[number // 10] + (f"-{_EN[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {english(number % size)}" if number % size else ""
    return f"{_EN[number // size]} {name}{rest}"


def german(number: int) -> str:
    """A number below 10,000 in German words."""
    if number < 20:
        return _DE[number]
    if number < 100:
        ones = "ein" if number % 10 == 1 else _DE[number % 10]
        return (f"{ones}und" if number % 10 else "") + _DE_TENS[number // 10]
    size, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    many = "ein" if number // size == 1 else _DE[number // size]
    return f"{many}{name}{german(number % size) if number % size else ''}"


def roman(number: int) -> str:
    """A number from 1 to 3,999 in Roman numerals."""
    written = ""
    for value, sign in _ROMAN:
        written, number = written + sign * (number // value), number % value
    return written
