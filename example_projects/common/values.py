"""The values of options: numbers within bounds, devices, and lists without repeats."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

LARGEST_SEED = 2**32 - 1
Number = TypeVar("Number", int, float)


def _checked(number: Number, fits: bool, must_be: str, said: object) -> Number:
    if not fits:
        raise argparse.ArgumentTypeError(f"must be {must_be}, but is {said}")
    return number


def at_least(lowest: int) -> Callable[[str], int]:
    """Reads the number of an option that must not be lower.

    Example:
        >>> at_least(0)("3")
        3
    """

    def whole_number(text: str) -> int:
        number = int(text)
        return _checked(number, number >= lowest, f"{lowest} or more", number)

    return whole_number


positive = at_least(1)


def seed(text: str) -> int:
    """The number of an option that random numbers are drawn by.

    Raises:
        argparse.ArgumentTypeError: numpy and torch have no such seed.

    Example:
        >>> seed("100")
        100
    """
    number = int(text)
    return _checked(number, 0 <= number <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}", number)


def rate(text: str) -> float:
    """The number of an option that must be more than 0, and finite.

    Raises:
        argparse.ArgumentTypeError: it is not.

    Example:
        >>> rate("1e-3")
        0.001
    """
    number = float(text)
    return _checked(number, 0 < number < math.inf, "more than 0", text)


def beta(text: str) -> float:
    """The number of an option by which a running mean forgets: from 0 to less than 1.

    Raises:
        argparse.ArgumentTypeError: it is not.

    Example:
        >>> beta("0.9")
        0.9
    """
    number = float(text)
    return _checked(number, 0 <= number < 1, "0 or more and less than 1", text)


def devices(text: str) -> str:
    """The option of that name: "auto", how many, or the numbers of some, as in "0," and "0,1".

    Raises:
        argparse.ArgumentTypeError: it is something else.

    Example:
        >>> devices("2")
        '2'
    """
    if not re.fullmatch(r"auto|-1|[1-9]\d*|\d+,|\d+(,\d+)+", text):
        raise argparse.ArgumentTypeError(f"must be 'auto', how many (1, 2), or which ('0,' or '0,1'), but is {text!r}")
    return text


class Distinct(argparse.Action):
    """Of an option with several values, each of which makes a run: none may be given twice."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Keep the values."""
        twice = [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            raise argparse.ArgumentError(self, f"{', '.join(twice)} is given more than once; give every value once")
        setattr(namespace, self.dest, values)
