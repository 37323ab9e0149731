"""Verbs of experiments: run, show."""

import json
from pathlib import Path
from typing import Any

from rudolph.cli.results import folders_here, write_results
from rudolph.console import say, stage_progress

HARDWARE_FLAGS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "micro_batch_size",
    "num_workers",
    "activation_checkpointing",
    "block_masks",
    "compile",
)


def add_run(verbs: Any) -> None:
    run = verbs.add_parser("run", help="run an experiment file; finished runs are skipped")
    run.add_argument("file", type=Path)
    run.add_argument("settings", nargs="*", metavar="key=value", help="settings over the file's")
    run.add_argument("--index", type=int, help="only the run of this number, for a job array")
    run.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    run.add_argument("--no-export", action="store_true", help="leave results/ as it is")
    hardware = run.add_argument_group("hardware: recorded, but no part of the question")
    hardware.add_argument("--accelerator", default="auto")
    hardware.add_argument("--devices", type=int, default=1)
    hardware.add_argument("--num-nodes", type=int, default=1)
    hardware.add_argument("--strategy", default="auto", help="Lightning's: ddp, fsdp, ...")
    hardware.add_argument("--precision", help="32-true, bf16-mixed, ...; the machine's by default")
    hardware.add_argument("--micro-batch-size", type=int, help="examples a device takes at once")
    hardware.add_argument("--num-workers", type=int, default=0)
    hardware.add_argument(
        "--activation-checkpointing", action="store_true", help="less memory, a third more time"
    )
    hardware.add_argument(
        "--block-masks", action="store_true", help="FlexAttention, on CUDA, without its dropout"
    )
    hardware.add_argument(
        "--compile", action="store_true", help="the decoder's layers; on a CPU it gains nothing"
    )
    run.set_defaults(verb=run_experiment)


def add_show(verbs: Any) -> None:
    show = verbs.add_parser("show", help="print the resolved runs of an experiment file")
    show.add_argument("file", type=Path)
    show.add_argument("settings", nargs="*", metavar="key=value")
    show.add_argument("--micro-batch-size", type=int, help="for the memory that is expected")
    show.add_argument("--activation-checkpointing", dest="checkpointing", action="store_true")
    show.add_argument("--schema", action="store_true", help="the JSON Schema of the settings")
    show.set_defaults(verb=show_experiment)


def run_experiment(given: Any) -> int:
    from rudolph.config import load_experiment

    loaded = load_experiment(given.file, given.settings)
    runs = list(loaded.runs)
    if given.index is not None:
        if not 0 <= given.index < len(runs):
            raise ValueError(f"--index must be 0 to {len(runs) - 1}, got {given.index}")
        runs = [runs[given.index]]
    if given.dry_run:
        for number, run in enumerate(runs):
            print(f"{number}  {run.name}  {run.config.digest[:8]}")
        return 0
    from rudolph.execution import Hardware, is_main_process

    hardware = Hardware(**{name: getattr(given, name) for name in HARDWARE_FLAGS})
    folders = folders_here()
    for run in runs:
        hardware.check(run.config)
    failed = [run.name for run in runs if not execute_run(loaded, run, hardware, folders)]
    if not is_main_process():
        return 0
    if given.settings:
        say("results/ stay as they are: with settings of the command line it is another question")
    elif not given.no_export and len(failed) < len(runs):
        say(f"results: {write_results(loaded, folders)}")
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def execute_run(loaded: Any, run: Any, hardware: Any, folders: Any) -> bool:
    """Execute one run unless it is finished; whether it is finished now."""
    from rudolph.experiment import execute, is_finished, run_folder
    from rudolph.results.tracking import tracking_uri
    from rudolph.training.callbacks import NonFiniteLossError

    folder = run_folder(folders, loaded, run)
    say(f"{loaded.name} / {run.name} ({run.config.digest[:8]})")
    if is_finished(folder):
        say(f"  finished before: {folder}")
        return True
    uri = tracking_uri(Path.cwd())
    try:
        with stage_progress() as progress:
            summary = execute(
                loaded, run, folders=folders, hardware=hardware, uri=uri, progress=progress
            )
    except NonFiniteLossError as error:
        say(f"  failed: {error}; the last good checkpoint is kept")
        return False
    print_scores(summary)
    say(f"  weights, samples and metrics: {folder}")
    return True


def print_scores(summary: dict[str, Any]) -> None:
    for name, value in summary["metrics"].items():
        low, high = summary["intervals"].get(name, (None, None))
        interval = f"  [{low:.3g}, {high:.3g}]" if low is not None else ""
        chance = summary["chance"].get(name)
        against = f"  chance {chance:.3g}" if chance is not None else ""
        target = summary["target"].get(name)
        wanted = f"  target {target:g}" if target is not None else ""
        say(f"  {name:44} {value:8.4g}{interval}{against}{wanted}")


def show_experiment(given: Any) -> int:
    from rudolph.config import RunConfig, load_experiment, to_yaml
    from rudolph.settings import json_schema

    if given.schema:
        print(json.dumps(json_schema(RunConfig), indent=1, ensure_ascii=False))
        return 0
    loaded = load_experiment(given.file, given.settings)
    micro = given.micro_batch_size
    for number, run in enumerate(loaded.runs):
        print(f"# {number}: {run.name}, digest {run.config.digest}")
        for line in memory_lines(run.config, micro, has_checkpointing=given.checkpointing):
            print(f"# {line}")
        print(to_yaml(run.config))
    return 0


def memory_lines(config: Any, micro: int | None, *, has_checkpointing: bool) -> list[str]:
    """What the decoder's training will need on one device, before anything is allocated."""
    import torch

    from rudolph.models.decoder import MaskedDecoder
    from rudolph.training.memory import training_memory
    from rudolph.training.optim import machine_precision
    from rudolph.training.tuning import apply_tuning

    with torch.device("meta"):
        model = MaskedDecoder(config.decoder, config.sequence_layout, config.vocabulary)
        apply_tuning(model, config.decoder_tuning)
    model.has_checkpointing = has_checkpointing
    size = micro or config.decoder_optim.global_batch_size
    need = training_memory(
        model,
        config.decoder_losses,
        config.decoder_optim,
        micro_batch_size=size,
        activation_bytes=4 if machine_precision() == "32-true" else 2,
    )
    parts = ("weights", "gradients", "optimizer", "activations")
    told = ", ".join(f"{name} {getattr(need, name) / 2**20:,.0f}" for name in parts)
    return [
        f"decoder: {need.trainable:,} of {need.total:,} parameters are trained",
        f"memory at {size} examples a device: {need.bytes / 2**20:,.0f} MiB ({told})",
    ]
