"""Links between pages, and to files that are no pages of docs, lead somewhere in the site too."""

import pytest

from docs._ext.outside import DOCS, ROOT, pages, with_links


@pytest.mark.parametrize(
    ("text", "folder", "expected"),
    [
        ("[a](choosing.md)", DOCS, "[a](choosing.md)"),
        ("[a](../choosing.md#x)", DOCS / "balancers", "[a](../choosing.md#x)"),
        ("[a](#here) [b](https://pytorch.org)", DOCS, "[a](#here) [b](https://pytorch.org)"),
        ("[a](../README.md)", DOCS, "[a](/index.md)"),
        ("[a](../CONTRIBUTING.md#tests)", DOCS, "[a](/generated/contributing.md#tests)"),
        ("[a](../../example_projects/pix2pix)", DOCS / "experiments", "[a](/generated/projects/pix2pix.md)"),
        ("[a](../example_projects/pix2pix/README.md)", DOCS, "[a](/generated/projects/pix2pix.md)"),
        ("[a](../LICENSE)", DOCS, "a"),
        ("[a](docs/choosing.md#x)", ROOT, "[a](/choosing.md#x)"),
        ("![a](docs/images/balance.png)", ROOT, "![a](/images/balance.png)"),
        ("![a](images/balance.png)", DOCS, "![a](images/balance.png)"),
        ("[a](../pix2pix)", ROOT / "example_projects" / "cyclegan", "[a](/generated/projects/pix2pix.md)"),
        ("losses[0](nothing.md)", DOCS, "losses[0](nothing.md)"),
    ],
)
def test_a_link_becomes_one_of_the_site(text, folder, expected):
    assert with_links(text, folder) == expected


def test_the_files_that_become_pages_are_there():
    assert all(source.exists() for source in pages())
    assert {page.name for page in pages().values()} >= {"contributing.md", "changelog.md", "srgan.md", "evidence.md"}
