"""The smallest speed experiments, from which their tests start."""

from pathlib import Path
from typing import Any

import yaml

from rudolph.benchmarks.benchmark_case import BenchmarkCase
from rudolph.config.experiment_file import load_experiment
from rudolph.runs.benchmark_run import benchmark_case_of
from rudolph.runs.execution import Execution, Folders, Hardware, NullRecorder

TINY: dict[str, Any] = {
    "data": {"image_size": 32},
    "tokenizer": {"vocab_size": 60, "num_specials": 17},
    "layout": {"left_text_length": 16, "right_text_length": 8},
    "vqgan": {
        "resolution": 32,
        "channels": [32, 32, 64, 64],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "z_channels": 32,
        "quantizer": {"num_codes": 32, "embedding_dim": 32},
    },
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2},
    "speed": {"batch_size": 2, "num_repetitions": 2, "roofline_bytes": 2**16, "roofline_side": 32},
}


def write_speed(folder: Path, workload: str, *implementations: str, **changes: Any) -> Path:
    """Write a tiny speed experiment; ``changes`` are settings of its ``speed`` section."""
    speed = {
        **TINY["speed"],
        "workload": workload,
        "implementations": list(implementations),
        **changes,
    }
    content = {"title": "Tiny", "question": "Is it fast?", "settings": {**TINY, "speed": speed}}
    path = folder / "experiments" / "speed" / f"{workload}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def speed_subject(
    folder: Path, workload: str, *implementations: str, **changes: Any
) -> BenchmarkCase:
    run = load_experiment(write_speed(folder, workload, *implementations, **changes)).runs[0]
    folders = Folders(folder, folder / "runs")
    execution = Execution(run, folder, folders, Hardware(), NullRecorder(), lambda *told: None)
    return benchmark_case_of(execution)
