"""The smallest whole run, from which tests of runs, commands and weights start."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from rudolph.config.experiment_file import load_experiment
from rudolph.runs.execution import Folders, Hardware, run_folder
from rudolph.runs.experiment import execute
from rudolph.tracking.mlflow_database import prepare_database

OPTIM = {
    "num_steps": 8,
    "global_batch_size": 4,
    "validate_every": 4,
    "warmup_steps": 2,
    "checkpoint_every": 3,
    "learning_rate": 0.01,
}
TINY: dict[str, Any] = {
    "title": "Tiny",
    "question": "Does a run hold together?",
    "settings": {
        "data": {"dataset": "shapes", "image_size": 24, "flip_probability": 0.5},
        "data.shapes": {"num_train": 40, "num_validation": 6, "num_test": 6},
        "tokenizer": {"vocab_size": 120, "bpe_dropout": 0.1},
        "layout": {"left_text_length": 20, "right_text_length": 20},
        "vqgan": {
            "resolution": 24,
            "channels": [4, 8, 8],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "z_channels": 4,
            "quantizer": {"kind": "ema", "num_codes": 12, "embedding_dim": 4},
        },
        "vqgan_optim": {**OPTIM, "ema_decay": 0.5},
        "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2},
        "optim": {**OPTIM, "ema_decay": 0.9},
        "evaluation": {
            "evaluators": ["scene_accuracy", "caption_f1", "reconstruction", "likelihood"],
            "splits": ["train", "test"],
            "num_examples": 4,
            "grid_prompts": ["красный круг в центре"],
            "grid_samples": 2,
        },
    },
    "targets": {"vqgan/psnr/test": 5},
    "report": {"table": ["vqgan/psnr/test"], "curves": ["decoder/val/loss"]},
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes, allow_unicode=True))
    return path


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """Ignore progress."""


@cache
def empty_database() -> bytes:
    """Create MLflow's tables once per process: they take longer than many a test."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        prepare_database(path)
        return path.read_bytes()


def run_tiny(folder: Path, overrides: tuple[str, ...] = (), **hardware: Any) -> Path:
    experiment = load_experiment(write(folder), overrides)
    if not (folder / "mlflow.db").exists():
        (folder / "mlflow.db").write_bytes(empty_database())
    folders = Folders(folder, folder / "runs")
    flags = {"precision": "32-true", "accelerator": "cpu"} | hardware
    execute(
        experiment,
        experiment.runs[0],
        folders=folders,
        hardware=Hardware(**flags),
        uri=f"sqlite:///{folder}/mlflow.db",
        progress=quiet,
    )
    return run_folder(folders, experiment, experiment.runs[0])
