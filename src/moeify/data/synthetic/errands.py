"""Synthetic instructions with answers: six kinds of short errands on numbers and letters."""

from __future__ import annotations

import random

from moeify.data.synthetic.numerals import english, german, roman


def errands(count: int, seed: int) -> list[dict[str, str]]:
    """Different instructions, `instruction`, with the right `answer` and their `group`.

    Args:
        count: how many.
        seed: of the choice.
    """
    chance = random.Random(seed)
    made: dict[str, dict[str, str]] = {}
    while len(made) < count:
        group = chance.choice(list(_KINDS))
        instruction, answer = _KINDS[group](chance)
        made.setdefault(instruction, {"instruction": instruction, "answer": answer, "group": group})
    return list(made.values())


def _word(chance: random.Random) -> str:
    return "".join(chance.choice("abcdefgh") for _ in range(chance.randint(3, 6)))


def _english(chance: random.Random) -> tuple[str, str]:
    number = chance.randint(1, 999)
    return f"Write {number} in English words.", english(number)


def _german(chance: random.Random) -> tuple[str, str]:
    number = chance.randint(1, 999)
    return f"Schreibe {number} in Worten.", german(number)


def _roman(chance: random.Random) -> tuple[str, str]:
    number = chance.randint(1, 999)
    return f"What is {number} in Roman numerals?", roman(number)


def _sum(chance: random.Random) -> tuple[str, str]:
    one, other = chance.randint(1, 99), chance.randint(1, 99)
    return f"Add {one} and {other}.", str(one + other)


def _capitals(chance: random.Random) -> tuple[str, str]:
    word = _word(chance)
    return f"Spell {word} in capitals.", word.upper()


def _backwards(chance: random.Random) -> tuple[str, str]:
    word = _word(chance)
    return f"Read {word} from right to left.", word[::-1]


_KINDS = {
    "english": _english, "german": _german, "roman": _roman, "sum": _sum, "capitals": _capitals,
    "backwards": _backwards,
}  # fmt: skip
