"""Sphinx configuration of the documentation site: ``sphinx-build -W docs build/site``."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import pathlib

from sphinx.application import Sphinx

from moe.analysis import explorer
from moe.planner import pages
from moe.playground.packed import read
from moe.playground.page import render
from moe.system import shipped

DOCS = pathlib.Path(__file__).parent
REPOSITORY = DOCS.parent
#: Tables that programs write, besides the suites' reports.
GENERATED = ("results/conformance", "results/paper_tables", "results/early/README")

project = "Mixture-of-Experts language models in JAX"
author = "the maintainers"
copyright = "the maintainers, Apache-2.0"
release = version = importlib.metadata.version("moe-jax")

extensions = [
    "myst_nb",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Pages are Markdown. Headings can be linked to by their slug, as on code hosts.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
# The tutorial is shown with the outputs that it was committed with; tests/test_tutorial.py executes it.
nb_execution_mode = "off"

apidoc_modules = [
    {
        "path": str(REPOSITORY / "moe"),
        "destination": "reference/",
        # Programs define command-line flags when they are imported, several of them the same; workers need other
        # libraries.
        "exclude_patterns": [
            f"{REPOSITORY.resolve()}/moe/{name}*"
            for name in ("programs", "__main__", "commands", "conformance/peers/workers", "configs", "results")
        ],
        # One page a package: a page a module would put 200 entries into every page's navigation.
        "separate_modules": False,
        "module_first": True,
    }
]
# Packages re-export names of their modules: each is described once, where it is defined.
autodoc_default_options = {"ignore-module-all": True}
# An optional dependency that the reference does not need.
autodoc_mock_imports = ["lm_eval"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Short names of types and attributes (bytes, model, tokens) that several classes have are not links.
suppress_warnings = ["ref.python"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "MoE in JAX"
# Where the site is built by the repository's own workflow, pages link to their source, and the tutorial to Colab.
if repository := os.environ.get("GITHUB_REPOSITORY"):
    html_theme_options = {
        "source_repository": f"https://github.com/{repository}",
        "source_branch": "main",
        "source_directory": "docs/",
    }


def colab_badge(app: Sphinx, page: str, source: list[str]) -> None:
    """Put a link to Colab at the head of the tutorial."""
    if page == "tutorial" and repository:
        notebook = json.loads(source[0])
        address = f"https://colab.research.google.com/github/{repository}/blob/main/docs/tutorial.ipynb"
        badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})\n"
        notebook["cells"].insert(1, {"cell_type": "markdown", "metadata": {}, "source": [badge]})
        source[0] = json.dumps(notebook)


def escape_bars(app: object, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Keep absolute values such as |x| in docstrings from being read as substitutions."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def leave_out(app: Sphinx, page: str, source: list[str]) -> None:
    """Keep logs and generated reports, which other pages link to, out of navigation and search."""
    if page.startswith("log/") or fnmatch.fnmatch(page, "results/*/report") or page in GENERATED:
        source[0] = f"---\norphan: true\nnosearch: true\n---\n\n{source[0]}"


def write_pages(app: Sphinx, error: Exception | None) -> None:
    """Make the pages of the shipped model to play with, docs/routing_explorer.json and docs/plan.json."""
    if error is None and app.builder.format == "html":
        pathlib.Path(app.outdir, "play.html").write_text(render(read(shipped.PLAYGROUND)))
        explored = (DOCS / "routing_explorer.json").read_text()
        pathlib.Path(app.outdir, "routing_explorer.html").write_text(explorer.render(explored))
        plan = pages.page(json.loads((DOCS / "plan.json").read_text()))
        pathlib.Path(app.outdir, "plan.html").write_text(plan)


def setup(app: Sphinx) -> None:
    """Register the hooks."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("source-read", leave_out)
    app.connect("source-read", colab_badge)
    app.connect("build-finished", write_pages)
