"""Distances between sets of images: closed forms, sums over pairs, and invariants."""

import itertools
import math

import numpy as np
import pytest

from rudolph.evaluation.metrics.images import frechet_distance, kernel_distance, squared_mmd


def whitened(rng: np.random.Generator, number: int, size: int) -> np.ndarray:
    """Return a sample with a mean of exactly 0 and the identity as covariance."""
    centred = rng.normal(size=(number, size))
    centred -= centred.mean(0)
    orthogonal, _ = np.linalg.qr(centred)
    return orthogonal * math.sqrt(number - 1)


def test_fid_of_two_normal_distributions_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    first, second = np.array([0.5, 1.0, 2.0]), np.array([1.5, 1.0, 0.0])
    means = np.array([1.0, -1.0, 0.0]), np.array([0.0, 1.0, 3.0])
    one, other = whitened(rng, 40, 3) * first + means[0], whitened(rng, 50, 3) * second + means[1]
    # Commuting covariances: squared distances between means and between standard deviations.
    expected = ((means[0] - means[1]) ** 2).sum() + ((first - second) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert frechet_distance(one @ turn, other @ turn) == pytest.approx(expected)


@pytest.mark.parametrize(("numbers", "size"), [((30, 25), 6), ((7, 9), 20), ((5, 5), 1)])
def test_fid_is_that_of_the_singular_values(numbers: tuple[int, int], size: int) -> None:
    rng = np.random.default_rng(1)
    one, other = (rng.normal(size=(n, size)) @ rng.normal(size=(size, size)) for n in numbers)
    # tr sqrt(A B) is the sum of the singular values of the product of the centred samples.
    centred = [(each - each.mean(0)) / math.sqrt(len(each) - 1) for each in (one, other)]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    traces = sum((each**2).sum() for each in centred)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + traces - 2 * overlap
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5)


def test_mmd_is_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within = [
        np.mean([kernel(x, y) for x, y in itertools.permutations(each, 2)])
        for each in (one, other)
    ]
    between = np.mean([kernel(x, y) for x, y in itertools.product(one, other)])
    assert squared_mmd(one, other) == pytest.approx(sum(within) - 2 * between)


def test_kid_is_near_0_for_equal_distributions_and_far_for_others() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 400, 8))
    alike = kernel_distance(one, other, rng=rng, num_subsets=30, subset_size=100)
    apart = kernel_distance(one, other + 1, rng=rng, num_subsets=30, subset_size=100)
    assert abs(alike.value) < 0.05 < 1 < apart.value
    assert alike.deviation > 0
    # Averaged over many pairs of samples, the estimate is 0 within its error.
    values = [squared_mmd(*rng.normal(size=(2, 20, 4))) for _ in range(500)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(500)


def test_kid_is_that_of_its_generator() -> None:
    one, other = np.random.default_rng(4).normal(size=(2, 30, 3))
    found = [
        kernel_distance(one, other, rng=np.random.default_rng(s), num_subsets=5, subset_size=10)
        for s in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    whole = kernel_distance(
        one, other, rng=np.random.default_rng(0), num_subsets=3, subset_size=30
    )
    assert whole == pytest.approx((squared_mmd(one, other), 0), abs=1e-12)


def test_sets_of_images_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(np.zeros((1, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="subset_size must be from 2 to 3, got 9"):
        kernel_distance(
            np.zeros((3, 2)), np.zeros((4, 2)), rng=np.random.default_rng(0), subset_size=9
        )
