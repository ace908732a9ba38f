"""Options of claims that compare with what others published; without a copy of it such a claim is not run."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse(parser: argparse.ArgumentParser, option: str, what: str) -> argparse.Namespace:
    """The arguments, among them the path of what was published; the program ends if it is not named.

    Args:
        parser: of the claim.
        option: the name of the path, without its dashes.
        what: has to lie there.
    """
    parser.add_argument(f"--{option}", type=Path, help=what)
    options = parser.parse_args()
    if getattr(options, option) is None:
        print(f"not run (peer missing): name {what} by --{option}")
        parser.exit()
    return options
