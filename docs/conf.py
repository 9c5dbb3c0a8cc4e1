"""The documentation site: ``sphinx-build -W -n docs site`` makes it.

What stands here are settings. What the site does beyond them is in ``docs/_ext``, one job a file.
"""

import logging
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning_mtadam  # noqa: E402

project = "lightning_mtadam"
author = "The lightning_mtadam contributors"
copyright = author
release = lightning_mtadam.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docs._ext.completeness",
    "docs._ext.inventories",
    "docs._ext.outside",
    "docs._ext.prose",
    "docs._ext.reference",
]
exclude_patterns = ["_ext", "_static"]
nitpicky = True
nitpick_ignore = [("py:class", "Figure"), ("py:class", "Image")]  # imported for type checkers only
# A pattern in a table of contents may match no page yet. Sphinx gives that warning no type to suppress it by.
TABLES_OF_CONTENTS = logging.getLogger("sphinx.sphinx.directives.other")
TABLES_OF_CONTENTS.addFilter(lambda record: "didn't match any documents" not in str(record.msg))

myst_heading_anchors = 4

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
    "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
}
intersphinx_timeout = 5

autodoc_inherit_docstrings = False  # what is inherited is explained where it comes from
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_display_short_literal_types = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"{project} {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
