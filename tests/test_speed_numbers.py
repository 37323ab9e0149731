"""Numbers of speed experiments: settings, intervals of ratios, bytes and operations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_speed import speed_subject, write_speed
from torch.utils.flop_counter import FlopCounterMode

from rudolph.benchmarks.benchmark_case import make_inputs
from rudolph.benchmarks.comparison import ComparisonResult
from rudolph.benchmarks.config import REFERENCE, ROOFLINE
from rudolph.benchmarks.flops import (
    decode_bytes,
    train_operations,
    upscaler_operations,
    vqgan_operations,
)
from rudolph.benchmarks.metrics import metrics_of
from rudolph.config.experiment_file import load_experiment
from rudolph.evaluation.statistics import ratio_interval, student_quantile
from rudolph.files.settings import ConfigError
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.upscaler import Upscaler, UpscalerConfig
from rudolph.reports.schema import Timing
from rudolph.reports.timings import mebibytes_text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workload": "draw"}, "workload must be one of decode, train"),
        ({"implementations": ["flaot32"]}, "got 'flaot32'; did you mean float32?"),
        (
            {"implementations": ["bfloat16"]},
            "implementations must be of roofline, reference, transformers",
        ),
        ({"implementations": []}, "implementations must be some of roofline"),
        ({"implementations": ["half", "half"]}, "implementations must differ"),
        ({"workload": None}, "implementations must be empty when workload is null"),
        ({"num_repetitions": 0}, "num_repetitions must be at least 1, got 0"),
        ({"workload": "train", "num_tokens": 3}, "num_tokens must be null for train, got 3"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    given = {"workload": "decode", "implementations": ["float32"]} | change
    path = write_speed(tmp_path, "decode", "float32")
    content = yaml.safe_load(path.read_text())
    content["settings"]["speed"] |= given
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_students_quantiles_are_those_of_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042}
    assert {n: round(student_quantile(n), 3) for n in known} == known


def test_a_ratio_is_of_pairs_and_what_slows_both_is_no_spread() -> None:
    slow = np.array([1.0, 3.0, 2.0, 8.0])
    value, low, high = ratio_interval(10 * slow, slow)
    assert (value, low, high) == pytest.approx((10, 10, 10))
    value, low, high = ratio_interval([2.0, 8.0], [1.0, 1.0])
    # By hand: logarithms ln 2 and 3 ln 2, standard error ln 2, t with one degree of freedom.
    width = np.exp(12.7062 * np.log(2))
    assert (value, low, high) == pytest.approx((4, 4 / width, 4 * width), rel=1e-3)
    assert ratio_interval([6.0], [2.0]) == pytest.approx((3, 3, 3))
    with pytest.raises(ValueError, match="pairs"):
        ratio_interval([1.0], [0.0])


def repeated(implementation: str, part: str, unit: str, *seconds: float) -> list[Timing]:
    return [
        Timing(implementation, part, unit, number, each, 100, 1000 + number)
        for number, each in enumerate(seconds)
    ]


def test_known_repetitions_give_known_numbers(tmp_path: Path) -> None:
    asked = speed_subject(tmp_path, "decode", ROOFLINE, REFERENCE, "half")
    found = ComparisonResult(
        repeated(ROOFLINE, "read", "byte", 1e-9, 2e-9)
        + repeated(REFERENCE, "", "token", 40.0, 80.0)
        + repeated("half", "", "token", 2.0, 4.0),
        weights_bytes={"half": 7},
    )
    metrics = metrics_of(asked, found)
    assert metrics["half", "speedup"] == pytest.approx((20, 20, 20))
    assert metrics["half", "seconds_per_token"].value == pytest.approx(0.02 * 2**0.5)
    assert metrics["half", "tokens_per_second"].value == pytest.approx(50 / 2**0.5)
    assert metrics["half", "peak_bytes"] == (1001, 1000, 1001)
    assert metrics["half", "weights_bytes"] == (7, 7, 7)
    # In both repetitions, 2e9 bytes could be read in the time of one token.
    share = decode_bytes(asked, "half") / 0.02 / 1e11
    assert metrics["half", "roofline_fraction"] == pytest.approx((share, share, share))
    assert not [name for name in metrics if name[0] == REFERENCE and "reference" in name[1]]


def test_a_steps_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    asked = speed_subject(tmp_path, "train", "float32")
    model = MaskedDecoder(asked.decoder, asked.layout, asked.vocabulary).train()
    tokens = torch.zeros(1, asked.layout.length, dtype=torch.long)
    length, texts = asked.layout.length, 16 + 8
    with FlopCounterMode(display=False) as counted:
        hidden = model.hidden(tokens)
        model.text_logits(hidden[:, :texts])
        model.image_logits(hidden[:, texts:])
    assert train_operations(asked) * length == pytest.approx(3 * counted.get_total_flops())


def test_a_tokens_bytes_are_those_of_weights_and_of_the_keys_that_it_sees(tmp_path: Path) -> None:
    asked = speed_subject(tmp_path, "decode", "float32")
    model = MaskedDecoder(asked.decoder, asked.layout, asked.vocabulary)
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    weights = 4 * (matrices + 32 * 16) / 2
    seen = 0.0
    for table in model.layer_tables:
        rows = table[16:32].double()
        seen += (rows[:, :16].sum() / 2 + rows[:, 16:].sum()).item() / 16
    assert decode_bytes(asked, "float32") == pytest.approx(weights + 2 * seen * 16 * 4)
    smaller = [decode_bytes(asked, name) for name in ("int8", "half", "float32")]
    assert smaller == sorted(smaller)


def test_a_images_operations_grow_with_its_area(tmp_path: Path) -> None:
    asked = speed_subject(tmp_path, "vqgan", "float32")
    counted = vqgan_operations(asked)
    assert counted["train"] == 3 * (counted["encode"] + counted["decode"])
    assert min(counted.values()) > 1e6
    # The chain of blocks at image resolution accounts for most operations.
    body = 2 * sum(p.numel() for p in Upscaler(UpscalerConfig()).body.parameters() if p.dim() > 1)
    assert 1 < upscaler_operations(asked) / (body * 32 * 32) < 1.2


def test_inputs_hold_what_a_sequence_may_hold(tmp_path: Path) -> None:
    asked = speed_subject(tmp_path, "train", "float32")
    inputs = make_inputs(asked)
    assert inputs["tokens"].shape == (2, asked.layout.length)
    assert inputs["tokens"].max() < 60 and inputs["tokens"][:, 16:32].max() < 32
    assert inputs["left"][0] == 2 and inputs["left"][-1] == 0
    again = make_inputs(asked)
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())


def test_memory_is_told_in_plain_numbers() -> None:
    told = [mebibytes_text(size * 2**20) for size in (36.04, 99.96, 593.4, 999.6, 1030.2)]
    assert told == ["36", "100", "593", "1,000", "1,030"]
    assert mebibytes_text(float("nan")) == ""
