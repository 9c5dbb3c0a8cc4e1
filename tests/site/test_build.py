"""The site is built without a warning, and has what it must have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "docs", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def text_of(page):
    return re.sub(r"<[^>]+>", "", page.read_text())


@pytest.mark.slow
def test_the_site_has_every_page_every_option_its_source_and_a_search(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    mtadam = site / "generated" / "names" / "lightning_mtadam.MTAdam.html"
    assert "balance_every: int = 1" in text_of(mtadam)
    assert "set_importance" in text_of(mtadam), "of an internal base"
    assert "[source]" in text_of(mtadam)
    assert (site / "_modules" / "lightning_mtadam" / "optim" / "mtadam.html").exists()
    assert "set_importance" in (site / "searchindex.js").read_text()


@pytest.mark.slow
def test_links_within_the_site_lead_somewhere(site):
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="(?!https?:|#|data:|mailto:)([^"#?]+)', page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(site)} links to {target}"
