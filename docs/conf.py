"""How the documentation is built, without a network: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import optfn

project = "optfn"
author = "The optfn authors"
copyright = author
version = release = optfn.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
nitpicky = True  # a reference to a name that does not exist is a warning, so an error
html_theme = "furo"
html_title = f"optfn {release}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 2
nb_execution_mode = "off"  # the notebooks hold their outputs; tests/test_notebooks.py runs them again

autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style"), "Reference"]

TORCH = "https://docs.pytorch.org/docs/stable/"
TORCH_PAGES = {"torch.Tensor": "tensors.html#torch.Tensor", "torch.dtype": "tensor_attributes.html#torch.dtype"}


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: nodes.TextElement) -> Any:
    """Where a name leads that Sphinx does not find: one of torch to its page, one of optfn to where it is documented."""
    target: str = node["reftarget"]
    if target.startswith("torch."):
        page = TORCH_PAGES.get(target, f"generated/{target}.html")
        return nodes.reference("", "", contents, internal=False, refuri=TORCH + page)
    if node.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    if (public := f"optfn.{target.rsplit('.', 1)[-1]}") in domain.objects:
        return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], public, node, contents)
    # A type in a signature that is not ours, such as Callable, or that nobody makes but us, stays text.
    theirs = not target.startswith("optfn.") or target.rsplit(".", 1)[-1].startswith("_")
    return contents if node["reftype"] == "class" and theirs else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve)
