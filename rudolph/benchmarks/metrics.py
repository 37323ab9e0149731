"""Metrics of a comparison, each with an interval.

Names are ``<implementation>[/<part>]/<quantity>``. Quantities of a part are
``seconds_per_token``, ``tokens_per_second``, ``speedup``, ``roofline_fraction``,
``operations_per_second`` and ``peak_bytes``; ``token`` stands for the part's unit. Quantities of
an implementation are ``weights_bytes`` and ``cache_bytes``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rudolph.benchmarks.benchmark_case import BenchmarkCase
from rudolph.benchmarks.comparison import ComparisonResult
from rudolph.benchmarks.config import REFERENCE, ROOFLINE
from rudolph.benchmarks.flops import (
    decode_bytes,
    train_operations,
    upscaler_operations,
    vqgan_operations,
)
from rudolph.evaluation.statistics import Estimate, geometric_mean_interval, ratio_interval
from rudolph.reports.schema import Timing

# Implementation and part -> its repetitions, in order.
Groups = Mapping[tuple[str, str], Sequence[Timing]]


def metrics_of(case: BenchmarkCase, result: ComparisonResult) -> dict[tuple[str, str], Estimate]:
    """Return every metric of a comparison, keyed by case and quantity.

    A case is the label of a timing: the implementation, with the part if there are several parts.
    Times and rates are geometric means with their intervals; ``peak_bytes`` is the maximum, with
    the minimum and the maximum as its interval.
    """
    groups: dict[tuple[str, str], list[Timing]] = {}
    for timing in result.timings:
        groups.setdefault((timing.implementation, timing.part), []).append(timing)
    metrics: dict[tuple[str, str], Estimate] = {}
    for (implementation, part), group in groups.items():
        name, unit, times = group[0].label, group[0].unit, unit_seconds(group)
        metrics[name, f"{unit}s_per_second"] = geometric_mean_interval(1 / times)
        if implementation == ROOFLINE:
            continue
        metrics[name, f"seconds_per_{unit}"] = geometric_mean_interval(times)
        peaks = [timing.peak_bytes for timing in group]
        metrics[name, "peak_bytes"] = Estimate(max(peaks), min(peaks), max(peaks))
        if implementation != REFERENCE and (REFERENCE, part) in groups:
            reference_times = unit_seconds(groups[REFERENCE, part])
            metrics[name, "speedup"] = ratio_interval(reference_times, times)
        for quantity, estimate in roofline_fraction(case, groups, implementation, part).items():
            metrics[name, quantity] = estimate
    for quantity, sizes in (
        ("weights_bytes", result.weights_bytes),
        ("cache_bytes", result.cache_bytes),
    ):
        for implementation, size in sizes.items():
            if size:
                metrics[implementation, quantity] = Estimate(size, size, size)
    return metrics


def unit_seconds(group: Sequence[Timing]) -> NDArray[np.float64]:
    """Return the seconds per unit in each repetition."""
    return np.array([timing.seconds / timing.units for timing in group])


def roofline_fraction(
    case: BenchmarkCase, groups: Groups, implementation: str, part: str
) -> dict[str, Estimate]:
    """Return the work per second and its fraction of the machine's limit in the same repetitions.

    Returns:
        ``operations_per_second`` for workloads that count operations, and ``roofline_fraction`` if
        the roofline was measured. The result is empty if the work of a unit is not counted.
    """
    rates = work_rates(case, groups[implementation, part], implementation, part)
    if rates is None:
        return {}
    estimates = {}
    if case.speed.workload in ("train", "vqgan", "upscaler"):
        estimates["operations_per_second"] = geometric_mean_interval(rates)
    limit_rates = roofline_rates(groups, is_read=case.speed.workload == "decode")
    if limit_rates is not None:
        estimates["roofline_fraction"] = ratio_interval(rates, limit_rates)
    return estimates


def work_rates(
    case: BenchmarkCase, group: Sequence[Timing], implementation: str, part: str
) -> NDArray[np.float64] | None:
    """Return the required bytes or operations per second in each repetition.

    Return None if the work of a unit is not counted.
    """
    workload = case.speed.workload
    if workload == "decode":
        work = decode_bytes(case, implementation)
    elif workload == "train":
        work = train_operations(case)
    elif workload == "vqgan":
        work = vqgan_operations(case)[part]
    elif workload == "upscaler":
        work = upscaler_operations(case)
    else:
        return None
    rates: NDArray[np.float64] = work / unit_seconds(group)
    return rates


def roofline_rates(groups: Groups, *, is_read: bool) -> NDArray[np.float64] | None:
    """Return the machine's rate in each repetition.

    The rate is the bytes read per second, or the operations per second of the fastest matrix
    product. Return None if the roofline (the machine's limits) was not measured.
    """
    parts = [part for name, part in groups if name == ROOFLINE and (part == "read") == is_read]
    rates = [1 / unit_seconds(groups[ROOFLINE, part]) for part in parts]
    return max(rates, key=lambda rate: float(rate.mean()), default=None)
