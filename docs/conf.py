"""Sphinx configuration."""

from importlib.metadata import version as package_version

project = "quailora"
author = "the quailora developers"
release = version = package_version("quailora")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "gallery"]
html_theme = "furo"
html_title = "quailora"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shape strings are for readers of the source; the docstrings state shapes in words
suppress_warnings = ["myst.header"]
