"""What the progress bar shows of the losses, and what it calls them: its line has little room."""

from __future__ import annotations

from functools import lru_cache

SHOWN = 6
"""How many terms are shown."""

LONGEST = 12
"""How many characters of a name."""


@lru_cache(maxsize=64)
def bar_names(tags: tuple[str, ...], total: str, *, summed: bool) -> dict[str, str]:
    """What to show of what is logged, and its name there.

    Args:
        tags: of the terms, and of their sum; what comes before the last slash is left out.
        total: the tag of the sum.
        summed: whether the sum means something. Of one term it is the term.

    Returns:
        Short names by tags; where two terms would be called the same, both keep their names.

    Example:
        >>> bar_names(("train/l1", "train/kl_loss", "train/loss_perceptual", "train/loss"), "train/loss", summed=True)
        {'train/loss': 'loss', 'train/l1': 'l1', 'train/kl_loss': 'kl', 'train/loss_perceptual': 'perceptual'}
        >>> bar_names(("train/loss_d", "train/d_loss", "train/loss"), "train/loss", summed=False)
        {'train/loss_d': 'loss_d', 'train/d_loss': 'd_loss'}
    """
    own = {tag: tag.rpartition("/")[2] for tag in tags if tag != total}
    short = {tag: _without_loss(name)[:LONGEST] for tag, name in own.items()}
    taken = [*short.values(), "loss"]
    names = {tag: name if taken.count(name) == 1 else own[tag] for tag, name in list(short.items())[:SHOWN]}
    return {total: "loss", **names} if summed and total in tags and len(own) > 1 else names


def _without_loss(name: str) -> str:
    for separator in "_-. ":
        name = name.removeprefix(f"loss{separator}").removesuffix(f"{separator}loss")
    return name
