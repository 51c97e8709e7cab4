"""How the pages become a site: `make docs`."""

from __future__ import annotations

import modelstore

project = "modelstore"
author = "the modelstore authors"
version = release = modelstore.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["build"]

# Pages are GitHub's Markdown: links to headings are made of their text, at any depth.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_rtype = False
default_role = "code"  # docstrings mark code by single backquotes, as Markdown does

html_theme = "furo"
html_title = "modelstore"
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = "$ "
