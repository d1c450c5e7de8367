"""How Sphinx builds the site: `sphinx-build -W -b dirhtml docs docs/_build`."""

from __future__ import annotations

from closewait_guard import __version__

project = "closewait_guard"
author = "the closewait_guard authors"
copyright = author  # noqa: A001 - the name that Sphinx asks for
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
# The docstrings mark code by single quotes, as Markdown does.
default_role = "literal"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "closewait_guard"
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"
