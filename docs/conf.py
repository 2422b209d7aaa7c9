"""Sphinx's settings for the site that docs/build_site.py builds; nothing of it is fetched from elsewhere, at any time."""

from __future__ import annotations

import re

project = "rome_lab"
author = "the authors of rome_lab"
copyright = "the authors of rome_lab"
html_title = "rome_lab"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.githubpages"]
root_doc = "index"
exclude_patterns: list[str] = []
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # what is shown comes from real runs, by make, and never from building the site
nb_merge_streams = True
nb_output_stderr = "remove"  # bars
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # would come from a CDN
suppress_warnings = ["mystnb.unknown_mime_type"]  # of record_values, whose text is shown

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
add_module_names = False
python_maximum_signature_line_length = 90

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields): *(.*)")
ENTRY = re.compile(r"((?:\*{0,2}\w[\w.\[\]]*(?:, )?)+): +(\S.*)")


def escaped(text: str) -> str:
    """Plain text as reStructuredText: code in backticks stays code, all other signs are themselves."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(
        rf"\ ``{part}``\ " if i % 2 else re.sub(r"([*_|`\\<>])", r"\\\1", part) for i, part in enumerate(parts)
    )


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of this house as reStructuredText: paragraphs, indented equations as they stand, lists of arguments."""
    rst: list[str] = []
    section = False
    for block in filter(str.strip, re.split(r"\n\s*\n", "\n".join(lines))):
        rows = block.splitlines()
        if match := SECTION.fullmatch(rows[0]):
            section = True
            rst += [*entries(rows), ""]
        elif rows[0].startswith(">>>"):
            rst += ["", *rows, ""]
        elif rows[0].startswith("  ") and not section or any("  " in row.strip() for row in rows):
            rst += ["", "::", "", *(f"    {row}" for row in rows), ""]
        else:
            for row in rows:
                rst += (
                    ["", f"**{match[1]}:** {escaped(match[2])}"]
                    if (match := SECTION.fullmatch(row))
                    else [escaped(row.strip())]
                )
            rst.append("")
    return rst


def entries(rows: list[str]) -> list[str]:
    """The rows of "Args:" and its like as a heading with a list: names and a colon begin an entry."""
    rst: list[str] = []
    for row in map(str.strip, rows):
        if match := SECTION.fullmatch(row):
            rst += ["", f"**{match[1]}:** {escaped(match[2])}"]
        elif match := ENTRY.fullmatch(row):
            rst += ["", f"- ``{match[1]}``: {escaped(match[2])}"]
        else:
            rst.append("  " * rst[-1].startswith(("- ", "  ")) + escaped(row))
    return rst


def setup(app: object) -> dict[str, bool]:
    """Sphinx calls this: docstrings go through `as_rst`."""

    def convert(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
        lines[:] = as_rst(lines)

    app.connect("autodoc-process-docstring", convert)
    return {"parallel_read_safe": True}
