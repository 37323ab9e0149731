"""A set of emoji small enough to be written by a test."""

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from rudolph.data.datasets.emoji import EMOJI_COLUMNS, EmojiRecord

NAMES = [field.name for field in fields(EmojiRecord)]


def write_set(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Write the table and the atlas, with 2 by 2 pixel tiles in different greys."""
    folder.mkdir(exist_ok=True)
    plain = dict.fromkeys(NAMES, "") | {"skin_tone": "none", "group": "Letters"}
    with (folder / "emoji.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        for at, row in enumerate(rows):
            writer.writerow(plain | {"key": f"{at:x}", "base": f"{at:x}"} | row)
    atlas = Image.new("RGB", (2 * EMOJI_COLUMNS, 2))
    for tile in range(EMOJI_COLUMNS):
        atlas.paste((4 * tile,) * 3, (2 * tile, 0, 2 * tile + 2, 2))
    atlas.save(folder / "emoji.png")
    return str(folder)
