"""The values of options that several commands have: seeds, decays, and lists without repeats."""

from __future__ import annotations

import argparse
from typing import Any

LARGEST_SEED = 2**32 - 1


def seed(text: str) -> int:
    """The number of an option that random numbers are drawn by.

    Raises:
        argparse.ArgumentTypeError: numpy and torch have no such seed.

    Example:
        >>> seed("100")
        100
    """
    number = int(text)
    if not 0 <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be from 0 to {LARGEST_SEED}, but is {number}")
    return number


def beta(text: str) -> float:
    """The number of an option by which a running mean forgets: from 0 to less than 1.

    Raises:
        argparse.ArgumentTypeError: it is not.

    Example:
        >>> beta("0.9")
        0.9
    """
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and less than 1, but is {text}")
    return number


class Distinct(argparse.Action):
    """Of an option with several values, each of which makes a run: none may be given twice."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Keep the values."""
        twice = [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            raise argparse.ArgumentError(self, f"{', '.join(twice)} is given more than once; give every value once")
        setattr(namespace, self.dest, values)
