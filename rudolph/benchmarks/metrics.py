"""Repetitions to numbers with intervals.

Names are ``<contestant>[/<part>]/<quantity>``: ``seconds_per_token``, ``tokens_per_second``,
``times_reference``, ``share_of_limit``, ``operations_per_second``, ``peak_bytes``; and of a
contestant ``weights_bytes`` and ``cache_bytes``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rudolph.benchmarks.config import LIMIT, REFERENCE
from rudolph.benchmarks.contest import Found
from rudolph.benchmarks.flops import (
    decode_bytes,
    train_operations,
    upscaler_operations,
    vqgan_operations,
)
from rudolph.benchmarks.subject import Subject
from rudolph.evaluation.statistics import Estimate, ratio_interval, repeated_interval
from rudolph.reports.repetitions import Repetition

# A contestant's part -> the repetitions of it, in their order.
Groups = Mapping[tuple[str, str], Sequence[Repetition]]


def metrics_of(subject: Subject, found: Found) -> dict[tuple[str, str], Estimate]:
    """Every number of a contest, by subject and quantity."""
    groups: dict[tuple[str, str], list[Repetition]] = {}
    for repetition in found.repetitions:
        groups.setdefault((repetition.contestant, repetition.part), []).append(repetition)
    metrics: dict[tuple[str, str], Estimate] = {}
    for (contestant, part), group in groups.items():
        name, unit, times = group[0].subject, group[0].unit, unit_seconds(group)
        metrics[name, f"{unit}s_per_second"] = repeated_interval(1 / times)
        if contestant == LIMIT:
            continue
        metrics[name, f"seconds_per_{unit}"] = repeated_interval(times)
        peaks = [repetition.peak_bytes for repetition in group]
        metrics[name, "peak_bytes"] = Estimate(max(peaks), min(peaks), max(peaks))
        if contestant != REFERENCE and (REFERENCE, part) in groups:
            others = unit_seconds(groups[REFERENCE, part])
            metrics[name, "times_reference"] = ratio_interval(others, times)
        for quantity, estimate in against_limit(subject, groups, contestant, part).items():
            metrics[name, quantity] = estimate
    for quantity, sizes in (
        ("weights_bytes", found.weights_bytes),
        ("cache_bytes", found.cache_bytes),
    ):
        for contestant, size in sizes.items():
            if size:
                metrics[contestant, quantity] = Estimate(size, size, size)
    return metrics


def unit_seconds(group: Sequence[Repetition]) -> NDArray[np.float64]:
    """Seconds of one unit in each repetition."""
    return np.array([each.seconds / each.units for each in group])


def against_limit(
    subject: Subject, groups: Groups, contestant: str, part: str
) -> dict[str, Estimate]:
    """What was done a second, and its share of what the machine could in the same repetition."""
    rates = work_rates(subject, groups[contestant, part], contestant, part)
    if rates is None:
        return {}
    found = {}
    if subject.speed.measure in ("train", "vqgan", "upscaler"):
        found["operations_per_second"] = repeated_interval(rates)
    limits = limit_rates(groups, is_read=subject.speed.measure == "decode")
    if limits is not None:
        found["share_of_limit"] = ratio_interval(rates, limits)
    return found


def work_rates(
    subject: Subject, group: Sequence[Repetition], contestant: str, part: str
) -> NDArray[np.float64] | None:
    """Needed bytes or operations a second; None where a unit's work is not counted."""
    measure = subject.speed.measure
    if measure == "decode":
        work = decode_bytes(subject, contestant)
    elif measure == "train":
        work = train_operations(subject)
    elif measure == "vqgan":
        work = vqgan_operations(subject)[part]
    elif measure == "upscaler":
        work = upscaler_operations(subject)
    else:
        return None
    rates: NDArray[np.float64] = work / unit_seconds(group)
    return rates


def limit_rates(groups: Groups, *, is_read: bool) -> NDArray[np.float64] | None:
    """What the machine did a second: of the fastest product, or of reading."""
    parts = [part for name, part in groups if name == LIMIT and (part == "read") == is_read]
    rates = [1 / unit_seconds(groups[LIMIT, part]) for part in parts]
    return max(rates, key=lambda rate: float(rate.mean()), default=None)
