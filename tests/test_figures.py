"""Figures: identical bytes at each drawing, and plots that match their numbers."""

import itertools
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rudolph.evaluation.statistics import mean_over_seeds
from rudolph.reports.figures import FIGURES, curves, intervals, pareto_front
from rudolph.reports.image_grids import (
    draw_codebook_usage,
    draw_masks_image,
    draw_reconstructions,
    sample_grid,
)
from rudolph.reports.report_cards import mean_card

LOSS = "val/loss"
RUNS = pd.DataFrame(
    [
        {
            "run": f"{variant}-{top_k}-{seed}",
            "variant": variant,
            "top_k": top_k,
            "seed": seed,
            LOSS: number + seed / 10 + top_k / 100,
            "rate": number - seed / 7 + top_k / 90,
            f"{LOSS}_low": number - 0.3,
            f"{LOSS}_high": number + 0.4,
            f"{LOSS}_chance": 4.0,
        }
        for number, variant in enumerate(["вся", "row"])
        for top_k in (16, 64)
        for seed in (0, 1)
    ]
)
CURVES = pd.DataFrame(
    [
        {"run": f"{variant}-{seed}", "variant": variant, "metric": LOSS, "step": step}
        | {"value": float(number + seed - step)}
        for number, variant in enumerate(["вся", "row"])
        for seed in (0, 1)
        for step in range(6)
    ]
)
CARD = pd.DataFrame(
    [
        {"run": f"{variant}-0", "variant": variant, "score": LOSS, "value": 0.3 + number / 5}
        | {"low": 0.2, "high": 0.9, "chance": 0.1 if number else np.nan}
        for number, variant in enumerate(["вся", "row"])
    ]
)
BEST_OF = pd.concat(
    [CARD.assign(score=f"{LOSS}/best_of_{number}/test", value=number / 9) for number in (1, 2, 8)]
)
SHOTS = pd.concat(
    [CARD.assign(score=f"{LOSS}_{number}/test", value=number / 9) for number in (0, 1, 8)]
)
REGIONS = CARD.assign(setting=LOSS, low=[0.2, 2], high=[0.5, 9], least=0.1, greatest=10, log=True)
EFFECTS = CARD.assign(metric=LOSS, than="col", p_value=0.01, at_least=0.1)
# Data and x-axis column of each kind of figure that is not drawn from the runs.
FRAMES = {
    "curves": (CURVES, "step"),
    "card": (CARD, "score"),
    "best_of": (BEST_OF, "score"),
    "shots": (SHOTS, "score"),
    "forest": (EFFECTS, "metric"),
    "regions": (REGIONS, "setting"),
}
METRICS = {"pareto": (LOSS, "rate"), "shots": (f"{LOSS}_*/test",)}
CAUSAL = np.tril(np.ones((9, 9), bool))
RANDOM = np.random.default_rng(0)
IMAGES = [RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(3)]


def draw(kind: str, path: Path) -> bytes:
    frame, x = FRAMES.get(kind, (RUNS, "top_k"))
    FIGURES[kind](frame, path, y=METRICS.get(kind, (LOSS,)), x=x, group_column="variant")
    return path.read_bytes()


def texts(path: Path) -> list[str]:
    """Return the texts in an SVG: matplotlib adds each as a comment next to its glyphs."""
    return re.findall(r"<!-- (.*?) -->", path.read_text("utf-8"))


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize("kind", FIGURES)
def test_a_second_drawing_is_equal_in_every_byte(kind: str, suffix: str, tmp_path: Path) -> None:
    first = draw(kind, tmp_path / f"first.{suffix}")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        assert draw(kind, tmp_path / f"second.{suffix}") == first
    assert matplotlib.rcParams["font.size"] != 9, "the style leaked"


@pytest.mark.parametrize("kind", FIGURES)
def test_a_figure_names_its_metric_and_every_variant(kind: str, tmp_path: Path) -> None:
    draw(kind, tmp_path / "figure.svg")
    said = " ".join(texts(tmp_path / "figure.svg"))
    assert all(word in said for word in (LOSS, "вся", "row"))


@pytest.mark.parametrize("kind", ["curves", "lines", "pareto"])
def test_runs_without_a_variant_are_drawn_as_one_group(kind: str, tmp_path: Path) -> None:
    frame, x = FRAMES.get(kind, (RUNS, "top_k"))
    for name, variant in {"none": np.nan, "named": "all"}.items():
        path = tmp_path / f"{name}.svg"
        rows = frame.assign(variant=variant)
        FIGURES[kind](rows, path, y=METRICS.get(kind, (LOSS,)), x=x, group_column="variant")
    assert (tmp_path / "none.svg").read_bytes() == (tmp_path / "named.svg").read_bytes()
    assert any("all" in said.split() for said in texts(tmp_path / "none.svg"))


@pytest.mark.parametrize("kind", FIGURES)
def test_the_order_of_the_rows_is_of_no_matter(kind: str, tmp_path: Path) -> None:
    frame, x = FRAMES.get(kind, (RUNS, "top_k"))
    if kind in ("intervals", "ratios"):
        frame = frame[frame["seed"] == 0]
    for name, rows in {"a": frame, "b": frame.iloc[::-1]}.items():
        path = tmp_path / f"{name}.png"
        FIGURES[kind](rows, path, y=METRICS.get(kind, (LOSS,)), x=x, group_column="variant")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("kind", FIGURES)
def test_a_missing_column_is_named(kind: str, tmp_path: Path) -> None:
    frame, x = FRAMES.get(kind, (RUNS, "top_k"))
    with pytest.raises(ValueError, match=r"expected a column of run, variant.*, got 'flavour'"):
        FIGURES[kind](frame, tmp_path / "x.svg", y=(LOSS,), x=x, group_column="flavour")


def test_the_front_holds_what_no_other_point_beats_in_both() -> None:
    places = RANDOM.normal(size=(40, 2)).round(1)
    for is_less in itertools.product((True, False), repeat=2):
        sides = np.where(is_less, 1, -1)
        expected = [
            point
            for point in places
            if not any(
                all(sides * other <= sides * point) and any(sides * other < sides * point)
                for other in places
            )
        ]
        found = pareto_front(places, is_less)
        assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
        assert (np.diff(found[:, 0]) >= 0).all()


def test_a_cell_of_several_runs_says_how_sure_it_is(tmp_path: Path) -> None:
    draw("heatmap", tmp_path / "figure.svg")
    half = mean_over_seeds(np.array([0.16, 0.26])).high - 0.21
    assert f"± {half:.1g}" in texts(tmp_path / "figure.svg")


def test_shots_are_counted_in_plain_numbers_and_averaged_over_seeds(tmp_path: Path) -> None:
    draw("shots", tmp_path / "figure.svg")
    said = texts(tmp_path / "figure.svg")
    assert {"0", "1", "8"} <= set(said) and not any("mathdefault" in text for text in said)
    seeds = [SHOTS.assign(run=f"a-seed{seed}", value=SHOTS["value"] + seed) for seed in (0, 1, 2)]
    card = mean_card(pd.concat([rows[rows["variant"] == "row"] for rows in seeds]))
    assert card["run"].tolist() == ["a"] * 3
    own = SHOTS[SHOTS["variant"] == "row"]
    np.testing.assert_allclose(card["value"], own["value"] + 1)
    expected = mean_over_seeds(own["value"].iloc[0] + np.arange(3.0))
    assert (card["low"].iloc[0], card["high"].iloc[0]) == pytest.approx(expected[1:])
    assert mean_card(own.assign(run="b"))["low"].tolist() == own["low"].tolist()


def test_a_missing_curve_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a curve of val/loss.*, got 'psnr'"):
        curves(CURVES, tmp_path / "x.svg", y=("psnr",), x="step", group_column="variant")


def test_between_its_points_a_seed_is_a_straight_line(tmp_path: Path) -> None:
    thinned = CURVES[(CURVES["run"] != "row-1") | CURVES["step"].isin([0, 2, 5])]
    assert len(thinned) < len(CURVES)
    for name, frame in {"all": CURVES, "thinned": thinned}.items():
        curves(frame, tmp_path / f"{name}.png", y=(LOSS,), x="step", group_column="variant")
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "thinned.png").read_bytes()


def test_chance_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    without = RUNS.drop(columns=f"{LOSS}_chance")
    for name, frame in {"with": RUNS, "without": without}.items():
        intervals(frame, tmp_path / f"{name}.svg", y=(LOSS,), x="seed", group_column="variant")
    assert "chance" in texts(tmp_path / "with.svg")
    assert "chance" not in texts(tmp_path / "without.svg")


@pytest.mark.parametrize("segments", [(3, 4, 2), (0, 9, 0)])
def test_a_mask_image_says_its_segments_and_density(
    segments: tuple[int, int, int], tmp_path: Path
) -> None:
    masks = {"causal": CAUSAL, "self": np.eye(9, dtype=bool)}
    draw_masks_image(masks, tmp_path / "a.svg", segments=segments)
    draw_masks_image(masks, tmp_path / "b.svg", segments=segments)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    said = texts(tmp_path / "a.svg")
    assert f"causal: {45 / 81:.1%} of pairs" in said and f"self: {9 / 81:.1%} of pairs" in said
    for name, length in zip(("left", "image", "right"), segments, strict=True):
        assert (name in said) == (length > 0)


def test_a_mask_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mask causal: expected a square of the sum of segments"):
        draw_masks_image({"causal": CAUSAL}, tmp_path / "x.png", segments=(3, 4, 3))


def test_a_sample_grid_keeps_every_pixel(tmp_path: Path) -> None:
    captions = ["красный кот на синем фоне смотрит в окно", "ёж", ""]
    for name in ("a.png", "b.png"):
        sample_grid(IMAGES, captions, tmp_path / name, columns=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    enlarged = np.kron(IMAGES[1], np.ones((8, 8, 1), np.uint8))
    assert (sheet[8 : 8 + 128, 144 : 144 + 128] == enlarged).all()
    # The first image has text below it, the empty caption has none.
    second_row = sheet.shape[0] // 2 + 4
    assert (sheet[140 : second_row - 4, 8:136] < 128).any()
    assert (sheet[second_row + 132 :, 8:136] == 255).all()


def test_a_sample_without_a_caption_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 images of shapes .* and 1 captions"):
        sample_grid(IMAGES, ["one"], tmp_path / "x.png", columns=2)


def test_a_perfect_reconstruction_leaves_a_white_difference(tmp_path: Path) -> None:
    broken = [255 - IMAGES[0], *IMAGES[1:]]
    draw_reconstructions(IMAGES, broken, tmp_path / "x.png")
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    height = (sheet.shape[0] - 8) // 3
    last = sheet[8 + 2 * height : 8 + 2 * height + 128]
    assert (last[:, 144 : 144 + 128] == 255).all()
    assert (last[:, 8:136] < 255).any()


def test_a_codebook_of_evenly_used_codes_has_their_number_as_perplexity(tmp_path: Path) -> None:
    draw_codebook_usage(np.array([7, 0, 7, 7, 7, 0, 0, 0]), tmp_path / "x.svg")
    assert "4 of 8 codes used (50%), perplexity 4.0" in texts(tmp_path / "x.svg")
    with pytest.raises(ValueError, match="expected at least one used code"):
        draw_codebook_usage(np.zeros(8, np.int64), tmp_path / "y.svg")
