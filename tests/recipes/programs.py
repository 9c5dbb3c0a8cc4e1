"""The programs of the recipes: each is the one ``python`` block of its page."""

import contextlib
import io
import re
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
NAMES = sorted(page.stem for page in RECIPES.glob("*.md") if page.stem != "index")


def page(name):
    return (RECIPES / f"{name}.md").read_text()


def block(name, language):
    """The one block of a language on a page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)
    return found


def run(name):
    """Run the program of a page as a script, in the working directory.

    Returns:
        Its global names, and what it printed.
    """
    found, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block(name, "python"), f"{name}.md", "exec"), found)
    return found, printed.getvalue()
