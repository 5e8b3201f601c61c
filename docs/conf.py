"""Sphinx configuration: the Markdown documents of this folder."""

project = "crowdmesh_jax"
author = "the crowdmesh_jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "logs"]
html_theme = "alabaster"
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "docutils"]  # docstrings are Markdown, not reST
