"""Paper, ink, letters and numbers: what all pictures share. Pillow draws them; matplotlib is no dependency."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = ImageFont | FreeTypeFont

RGB = tuple[int, int, int]

PAPER: RGB = (255, 255, 255)
"""Opaque, so that a picture is read as well on a dark page as on a light one."""
INK: RGB = (33, 33, 33)
FAINT: RGB = (110, 110, 110)
RULED: RGB = (222, 222, 222)
LETTERS, SMALL_LETTERS = 26, 22
"""Large, in pixels: TensorBoard shows a picture at a third of its width until it is clicked, without smoothing."""
LINE, MARGIN = 34, 24


@lru_cache
def font(size: int = LETTERS) -> Font:
    """The letters that Pillow brings.

    Raises:
        ImportError: Pillow is not installed, or older than 10.1.
    """
    try:
        from PIL import ImageFont

        return ImageFont.load_default(size)
    except (ImportError, TypeError) as error:  # before Pillow 10.1 they have one size
        raise ImportError("Pictures are drawn by Pillow, 10.1 or newer: pip install 'pillow>=10.1'.") from error


def new_image(width: int, height: int) -> tuple[Image, ImageDraw]:
    """An empty sheet, and what draws on it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def width_of(text: str, size: int = LETTERS) -> int:
    """How many pixels a line of text takes."""
    return int(font(size).getlength(text) + 0.999)


def widest(texts: Sequence[str]) -> int:
    """How many pixels the longest of them takes."""
    return max(map(width_of, texts), default=0)


def shortened(text: str, width: int) -> str:
    """The text, or so much of its end as fits: the end of a layer's name says what it is.

    Example:
        >>> shortened("encoder.block.attention.weight", 160)
        '...on.weight'
    """
    if width_of(text) <= width:
        return text
    while text and width_of(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and width_of(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def write_lines(draw: ImageDraw, place: tuple[int, int], lines: Sequence[str], ink: RGB = INK) -> None:
    """Write lines below each other."""
    for index, line in enumerate(lines):
        draw.text((place[0], place[1] + index * LINE), line, ink, font())


def stacked(pictures: Sequence[Image]) -> Image:
    """Pictures below each other, on one sheet."""
    if len(pictures) == 1:
        return pictures[0]
    sheet, _ = new_image(max(picture.width for picture in pictures), sum(picture.height for picture in pictures))
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def number(value: float) -> str:
    """A number in at most six letters.

    Example:
        >>> [number(value) for value in (0.0, 1.0, -0.25, 0.0123, 12.34, 1234.0, 2e-5, 3e7)]
        ['0', '1', '-0.25', '0.012', '12', '1234', '2e-5', '3e7']
    """
    size = abs(value)
    if size and not 9.95e-4 <= size < 9_999.5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    digits = 0 if size >= 9.95 else 1 if size >= 0.995 else 2 if size >= 0.0995 else 3
    return f"{value:.{digits}f}".removesuffix(".0") if size else "0"
