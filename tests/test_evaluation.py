"""Estimates and intervals: computed by hand, by brute force, and tested for coverage."""

import numpy as np
import pytest
import torch

from rudolph.data.datasets.shapes import Shapes, ShapesConfig
from rudolph.evaluation.metrics.answers import nearest_ranks, token_f1
from rudolph.evaluation.report_card import EVALUATORS, EvaluationConfig
from rudolph.evaluation.statistics import mean_interval, proportion_interval
from rudolph.models.image_metrics import psnr, psnr_32px, ssim


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("пожарный: темный тон кожи", "пожарный: темный тон кожи", 1.0),
        ("Пожарный, тёмный", "пожарный", 2 / 3),
        ("тон кожи тон", "тон кожи", 0.8),
        ("флаг: Италия", "олень", 0.0),
        ("", "", 1.0),
        ("", "олень", 0.0),
        ("«олень»", "олень!", 1.0),
    ],
)
def test_token_f1_worked_by_hand(prediction: str, truth: str, expected: float) -> None:
    assert token_f1(prediction, truth) == pytest.approx(expected)
    assert token_f1(truth, prediction) == pytest.approx(expected)


def test_ranks_are_those_of_a_sorted_list_of_distances() -> None:
    torch.manual_seed(0)
    gallery, images = torch.rand(30, 3, 4, 4), torch.rand(9, 3, 4, 4)
    gallery[7] = gallery[3]  # two equal images have the same rank
    own = torch.arange(9)
    found = nearest_ranks(images, gallery, own)
    for image, at, rank in zip(images, own.tolist(), found.tolist(), strict=True):
        distances = [(image - other).square().sum().item() for other in gallery]
        assert rank == 1 + sum(distance < distances[at] for distance in distances)
    assert nearest_ranks(gallery, gallery, torch.arange(30)).tolist() == [1] * 30


def test_psnr_and_ssim_of_known_images() -> None:
    truth = torch.rand(2, 3, 16, 16)
    off = (truth + 0.1).clamp(max=2)
    assert psnr(off, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    # Averages of 2 x 2 pixels remove a checkerboard of errors, but not a constant one.
    grey, board = torch.full((1, 3, 64, 64), 0.5), torch.ones(64, 64)
    board[::2, ::2] = board[1::2, 1::2] = -1
    assert psnr_32px(grey + 0.1 + board / 4, grey).item() == pytest.approx(20.0, abs=1e-3)
    assert ssim(truth, truth).tolist() == pytest.approx([1.0, 1.0])
    assert (ssim(torch.rand(2, 3, 16, 16), truth) < 0.5).all()


def test_wilsons_interval_has_the_published_bounds() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert proportion_interval(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    assert proportion_interval(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=1e-4)
    assert proportion_interval(20, 20).high == 1.0


@pytest.mark.parametrize("kind", ["share", "mean"])
def test_nineteen_of_twenty_intervals_hold_the_truth(kind: str) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        if kind == "share":
            sample, truth = (rng.random(60) < 0.3).astype(float), 0.3
        else:
            sample, truth = rng.exponential(size=60), 1.0
        found = mean_interval(sample, seed=seed)
        assert found.low <= found.value <= found.high
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_an_interval_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(1).random(50)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")]])
def test_no_values_or_broken_ones_have_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="needs"):
        mean_interval(values, seed=0)


def test_an_unknown_question_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=", ".join(EVALUATORS)):
        EvaluationConfig(evaluators=("fid",))


def test_the_shapes_that_are_asked_have_different_sentences() -> None:
    shapes = Shapes(ShapesConfig(), split="test", image_size=24)
    sentences = [shapes.scene(index).sentence for index in shapes.distinct(200)]
    assert len(set(sentences)) == 200
