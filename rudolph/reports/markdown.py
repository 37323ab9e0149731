"""Markdown that the pages of ``results/`` are made of."""

from collections.abc import Sequence


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table; bars and line ends in the cells do no harm."""
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"
