"""Markdown of the pages in ``results/``."""

from collections.abc import Sequence


def table_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table; bars in cells are escaped and line breaks removed."""
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"
