"""Image grids and figures with any text: drawn, cut or refused in one line."""

import errno
import random
import textwrap
import time
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fuzzing import num_cases, random_text
from matplotlib.figure import Figure
from PIL import Image, ImageFont
from test_figures import FRAMES, LOSS, METRICS, RUNS, texts

from rudolph.reports import image_grids
from rudolph.reports.figures import FIGURES
from rudolph.reports.image_grids import MAX_CAPTION_CHARACTERS, sample_grid
from rudolph.reports.style import DrawingError, drawable_text

BLACK = np.zeros((16, 16, 3), np.uint8)
NASTY = {
    "formula": r"$\foo$",
    "two dollars": "$$",
    "backslash": "\\$ 5 $",
    "control": "a\x01b\x85c\u2029d\x00e\ufffe",
    "lines": "a\nb\rc\td",
    "surrogate": "кот \ud83d",
    "emoji": "🙂 👩\u200d🚒 🇷🇺",
    "right to left": "שלום \u202e مرحبا",
    "long": "длинное слово " * 2000,
    "one word": "а" * 20_000,
    "empty": "",
    "space": " \u00a0 ",
}


def named(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rename the variant of all runs; Python strings can contain surrogates, Arrow's cannot."""
    return frame.assign(variant=pd.Series([name] * len(frame), frame.index, dtype=object))


def wrapped_by_scan(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap a text by trying every line length, from the longest down."""
    for most in range(max(len(text), 1), 0, -1):
        lines = textwrap.wrap(text, most) or [""]
        if max(font.getlength(line) for line in lines) <= width:
            break
    return lines


@pytest.mark.parametrize("width", [40, 128, 256])
def test_captions_are_wrapped_at_the_most_characters_that_fit(width: int) -> None:
    rng, font = random.Random(0), image_grids._font(12)
    for _ in range(20):
        letters = rng.choice(["ilWMшжт. ,-АVТ", "красный круг ", "iiiii ", "ЩЖШ "])
        text = "".join(rng.choices(letters, k=rng.randrange(90)))
        assert image_grids._wrap(text, font, width) == wrapped_by_scan(text, font, width)


@pytest.mark.parametrize("text", ["красное сердце " * 1400, "а" * 20_000])
def test_a_very_long_caption_is_cut_and_drawn_at_once(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    sample_grid([BLACK] * 8, [text] * 8, tmp_path / "a.png", columns=4)
    # Wrapping took minutes when every line length was tried for every image.
    assert time.process_time() - started < 2
    sample_grid([BLACK] * 8, [text[:500]] * 8, tmp_path / "b.png", columns=4)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sample_grid(
        [BLACK] * 8, [text[: MAX_CAPTION_CHARACTERS // 4]] * 8, tmp_path / "c.png", columns=4
    )
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


@pytest.mark.parametrize("name", NASTY)
def test_a_grid_has_any_caption(tmp_path: Path, name: str) -> None:
    sample_grid([BLACK], [NASTY[name]], tmp_path / "a.png", columns=1)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("name", NASTY)
def test_a_figure_has_any_name_of_a_variant(tmp_path: Path, name: str, suffix: str) -> None:
    for kind in ("lines", "forest"):
        frame, x = FRAMES.get(kind, (RUNS, "top_k"))
        frame = named(frame, NASTY[name])
        path = tmp_path / f"{kind}{suffix}"
        FIGURES[kind](frame, path, y=METRICS.get(kind, (LOSS,)), x=x, group_column="variant")
        assert path.stat().st_size > 0
        if suffix == ".svg":
            xml.dom.minidom.parse(str(path))


def test_a_dollar_is_drawn_as_a_dollar(tmp_path: Path) -> None:
    frame = RUNS.assign(variant="$x$", **{"$y": RUNS[LOSS]})
    FIGURES["lines"](frame, tmp_path / "a.svg", y=("$y",), x="top_k", group_column="variant")
    assert {"$y", "$x$ (4 runs)"} <= set(texts(tmp_path / "a.svg"))


def test_any_text_is_drawn_by_matplotlib(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "a.svg"
    for _ in range(num_cases(6)):
        name = random_text(rng, longest=rng.choice([3, 30, 500]))
        FIGURES["lines"](named(RUNS, name), path, y=(LOSS,), x="top_k", group_column="variant")
        xml.dom.minidom.parse(str(path))
        assert len(drawable_text(name).replace(r"\$", "$")) <= 200


def test_what_cannot_be_drawn_or_written_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: Path, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((Image.Image, "save"), (Figure, "savefig")):
        monkeypatch.setattr(owner, name, full)
    (tmp_path / "a.png").write_bytes(b"old")
    for draw in (
        lambda: sample_grid([BLACK], ["кот"], tmp_path / "a.png", columns=1),
        lambda: FIGURES["lines"](
            RUNS, tmp_path / "a.png", y=(LOSS,), x="top_k", group_column="variant"
        ),
    ):
        with pytest.raises(DrawingError) as error:
            draw()
        assert (
            str(error.value) == f"{tmp_path / 'a.png'}: cannot be drawn (No space left on device)"
        )
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DrawingError, match=r"cannot be drawn \((Not a directory|File exists)\)"):
        sample_grid([BLACK], ["кот"], tmp_path / "file" / "a.png", columns=1)
