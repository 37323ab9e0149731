"""Distances between the distributions of generated and real images.

Any network may provide the features.  Its name and the number of images belong to the
``MetricProtocol`` of the value.  Metrics of single images (PSNR, SSIM) are in
``models.image_metrics``.

Source: Heusel 2017 (FID), Binkowski 2018 (KID).

Shapes: N and M images, D features.
"""

from typing import Any, NamedTuple

import numpy as np


def frechet_distance(features: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """Return FID: the squared Frechet distance of the normal distributions fitted to two sets.

    FID grows as the number of distinct images falls, so it also grows in a bootstrap resample.
    Compare only values that use the same number of images, and use many more images than D.

    Args:
        features: features of the generated images, ``(N, D)``, float64.
        truth: features of the real images, ``(M, D)``, float64.

    Raises:
        ValueError: if D differs or a set has fewer than two images.
    """
    _require_matching(features, truth)
    difference = features.mean(0) - truth.mean(0)
    covariances = [np.atleast_2d(np.cov(sample, rowvar=False)) for sample in (features, truth)]
    # tr sqrt(A B) equals tr sqrt(sqrt(A) B sqrt(A)); that product is symmetric, so its eigenvalues
    # are real.
    root = _square_root(covariances[0])
    eigenvalues = np.linalg.eigvalsh(root @ covariances[1] @ root)
    # Rounding makes zero eigenvalues slightly negative.
    overlap = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(difference @ difference + traces - 2 * overlap)


def _square_root(symmetric: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


class KernelDistance(NamedTuple):
    """KID: mean and standard deviation over subsets."""

    value: float
    deviation: float


def kernel_distance(
    features: np.ndarray[Any, Any],
    truth: np.ndarray[Any, Any],
    *,
    rng: np.random.Generator,
    num_subsets: int = 100,
    subset_size: int = 1000,
) -> KernelDistance:
    """Return KID: the unbiased squared MMD over random subsets of both sets.

    Subsets are sampled without replacement.  For equal distributions KID is as often negative as
    positive.

    Args:
        features: features of the generated images, ``(N, D)``, float64.
        truth: features of the real images, ``(M, D)``, float64.
        rng: generator of the subsets.
        num_subsets: number of subsets.
        subset_size: images of each set per subset, at most the size of the smaller set.

    Raises:
        ValueError: if D differs, a set is smaller than a subset, or ``num_subsets`` is below 1.
    """
    _require_matching(features, truth)
    if not 2 <= subset_size <= min(len(features), len(truth)):
        raise ValueError(
            f"subset_size must be from 2 to {min(len(features), len(truth))}, got {subset_size}"
        )
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    values = []
    for _ in range(num_subsets):
        subsets = [
            sample[rng.choice(len(sample), subset_size, replace=False)]
            for sample in (features, truth)
        ]
        values.append(squared_mmd(*subsets))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def squared_mmd(features: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """Return the unbiased squared maximum mean discrepancy, with kernel ``(x.y / D + 1) ** 3``.

    Args:
        features: features of the generated images, ``(N, D)``, float64.
        truth: features of the real images, ``(M, D)``, float64.

    Raises:
        ValueError: if D differs or a set has fewer than two images.
    """
    _require_matching(features, truth)
    within = [_mean_off_diagonal(_kernel(sample, sample)) for sample in (features, truth)]
    return float(sum(within) - 2 * _kernel(features, truth).mean())


def _kernel(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (one @ other.T / one.shape[1] + 1) ** 3


def _mean_off_diagonal(square: np.ndarray[Any, Any]) -> float:
    """Return the mean of all entries off the diagonal, for an unbiased estimate."""
    size = len(square)
    return float((square.sum() - np.trace(square)) / (size * (size - 1)))


def _require_matching(features: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> None:
    if features.ndim != 2 or truth.ndim != 2 or features.shape[1] != truth.shape[1]:
        shapes = f"{features.shape} and {truth.shape}"
        raise ValueError(f"features must be (N, D) and (M, D), got {shapes}")
    if min(len(features), len(truth)) < 2:
        raise ValueError(f"at least 2 images are needed, got {len(features)} and {len(truth)}")
