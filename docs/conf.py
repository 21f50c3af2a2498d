"""Sphinx settings for `make docs`. The build works offline."""

import builtins
import os
import re
from importlib import metadata
from pathlib import Path
from types import GenericAlias
from typing import Any

import numpy as np
import numpy.typing as npt

project = "transferkit"
project_copyright = "The transferkit developers"
release = metadata.version("transferkit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nitpicky = True  # a reference to a name that is on no page is a warning, and warnings are errors

myst_heading_anchors = 3

default_role = "py:obj"  # backticks in docstrings are code, and a link if they name something in the library
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
add_module_names = False
highlight_language = "text"

pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"transferkit {release}"
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["transferkit.css"]
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".go, .gp"  # copy only the input lines of a doctest, without prompts
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

nitpick_ignore = [
    ("py:class", "transferkit.data.sources.Source"),  # a protocol, described in words
    ("py:class", "transferkit.training.loss.FunctionLoss"),  # what a function of the user becomes
    ("py:class", "transferkit.training.training.Training"),  # for the library's own modules
]
nitpick_ignore_regex = [("py:class", r"transferkit\.[\w.]+\._\w+")]  # type variables

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FOREIGN = (
    "Axes",
    "Figure",
    "collections",
    "functools",
    "matplotlib",
    "numpy",
    "os",
    "pathlib",
    "random",
    "PIL",
    "torch",
    "torchvision",
    "typing",
)


def link(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Link public names, wherever their module is; leave names of other libraries and plain code without a link.

    Any other name is a warning: it belongs to this library but is on no page.
    """
    import transferkit
    from transferkit import errors

    target = node.get("reftarget", "")
    name = target.rpartition(".")[2]
    home = "transferkit" if name in transferkit.__all__ else "transferkit.errors" if hasattr(errors, name) else None
    if home is not None and (target == name or target.startswith("transferkit.")):
        python = env.get_domain("py")
        place = node.get("refdoc", "")
        found = python.resolve_xref(env, place, app.builder, "obj", f"{home}.{name}", node, contnode)
        if found is not None:
            return found
    foreign = target.partition(".")[0] in FOREIGN or hasattr(builtins, target)
    return contnode if foreign or node.get("reftype") == "obj" else None


OWN_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}


def lead_out_of_docs(_app: Any, docname: str, source: list[str]) -> None:
    """Redirect relative links to files outside docs/, which work on a repository's web page, to pages here."""

    def lead(match: re.Match[str]) -> str:
        place = DOCS / docname
        target = Path(os.path.normpath(place.parent / match[1]))
        if target.is_relative_to(DOCS):
            return match[0]
        name = target.relative_to(ROOT).as_posix()
        if name in OWN_PAGES:
            return f"]({os.path.relpath(DOCS / OWN_PAGES[name], place.parent)})"
        return f"](path:{match[1]})"  # Sphinx copies the file

    source[0] = re.sub(r"\]\(((?:\.\./)+[^)#\s]+)\)", lead, source[0])


def name_attributes(_app: Any, doctree: Any) -> None:
    """Title the attributes of a class "Attributes", as in the docstrings."""
    for heading in doctree.findall(lambda node: node.tagname == "field_name" and node.astext() == "Variables"):
        heading[0] = type(heading[0])("Attributes")


class Array:
    """Replaces `numpy.typing.NDArray`, which would print as `ndarray[tuple[Any, ...], dtype[float32]]`."""

    def __class_getitem__(cls, kind: Any) -> GenericAlias:
        return GenericAlias(np.ndarray, (kind,))


def setup(app: Any) -> None:
    """Register all of this before the library is imported."""
    npt.NDArray = Array  # type: ignore[misc]
    npt.ArrayLike = type("ArrayLike", (), {"__module__": "numpy.typing"})  # type: ignore[misc]
    app.connect("doctree-read", name_attributes)
    app.connect("source-read", lead_out_of_docs)
    app.connect("missing-reference", link)
