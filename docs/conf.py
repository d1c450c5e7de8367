"""How Sphinx builds the site: `sphinx-build -W -b dirhtml docs docs/_build`."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

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


def setup(app: Sphinx) -> None:
    app.connect("source-read", lambda _, docname, source: show_names_of_programs(docname, source))


def show_names_of_programs(docname: str, source: list[str]) -> None:
    """Name each program above its code, as other programs and commands of the page do."""
    service = "../" * docname.count("/") + "cookbook/service.py"

    def with_caption(program: re.Match[str]) -> str:
        name, code = program.groups()
        needs = f", with [service.py]({service})" if "import service" in code else ""
        return f"```{{code-block}} python\n:caption: {name}{needs}\n\n{code}```"

    program = re.compile(r"<!-- program: (\S+) -->\n+```python\n(.*?)```", re.DOTALL)
    source[0] = program.sub(with_caption, source[0])
