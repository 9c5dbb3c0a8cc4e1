"""Pages and links beyond ``docs``: README, CONTRIBUTING, CHANGELOG and the READMEs of the example projects.

On a page they are linked to as files, as a reader of the repository needs it. In the site these files become pages, and
the links lead there; a link to another file of the repository becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\((?!https?:|#)([^)#\s]*)(#[^)\s]*)?\)")
IMAGE = re.compile(r"(!\[[^\]]*\]\()(?!https?:)([^)\s]+)(\))")


def pages() -> dict[Path, Path]:
    """Each file beyond ``docs`` that is a page of the site, and where that page stands."""
    found = {ROOT / f"{name}.md": GENERATED / f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG")}
    projects = sorted((ROOT / "example_projects").glob("*/README.md"))
    return {**found, **{path: GENERATED / "projects" / f"{path.parent.name}.md" for path in projects}}


def page_of(target: Path) -> Path | None:
    """The page that stands for a file or folder of the repository; ``None`` if none does.

    Example:
        >>> page_of(ROOT / "CHANGELOG.md").name, page_of(ROOT / "README.md").name, page_of(ROOT / "LICENSE")
        ('changelog.md', 'index.md', None)
    """
    if target.is_relative_to(DOCS):
        return target
    if target in (ROOT, ROOT / "README.md"):
        return DOCS / "index.md"
    return pages().get(target, pages().get(target / "README.md"))


def with_links(text: str, folder: Path) -> str:
    """The text of a page, with its links as the site needs them.

    Args:
        text: Markdown.
        folder: of the file that the text is from, to which links are relative.

    Example:
        >>> with_links("[a](docs/choosing.md#x), [b](LICENSE)", ROOT)
        '[a](/choosing.md#x), b'
    """

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], Path(os.path.normpath(folder / match[2])), match[3] or ""
        if not target.exists() or (target.is_relative_to(DOCS) and folder.is_relative_to(DOCS)):
            return match[0]
        page = page_of(target)
        return f"[{words}](/{page.relative_to(DOCS)}{anchor})" if page else words

    def image(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[2]))
        outside = not folder.is_relative_to(DOCS) and target.is_relative_to(DOCS)
        return f"{match[1]}/{target.relative_to(DOCS)}{match[3]}" if outside else match[0]

    return IMAGE.sub(image, LINK.sub(link, text))


def write(path: Path, text: str) -> None:
    """Write a page, unless it is there as it is: Sphinx then need not read it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_pages(app: Sphinx) -> None:
    """Before pages are read: write those that stand for files beyond ``docs``."""
    for source, page in pages().items():
        write(page, with_links(source.read_text(), source.parent))


def mend_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """When a page is read: its links beyond ``docs``."""
    source[0] = with_links(source[0], Path(app.env.doc2path(docname)).parent)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", mend_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
