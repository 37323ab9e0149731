"""Verbs of experiments: run, show."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rudolph.cli.results import RESULTS_FOLDER, folders_here, write_results
from rudolph.files.atomic import explain_os_error
from rudolph.runs.console import print_line, stage_progress

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
    run.add_argument("file", type=Path, help="an experiment, or a folder of them")
    run.add_argument("settings", nargs="*", metavar="key=value", help="settings over the file's")
    run.add_argument("--index", type=int, help="only the run of this number, for a job array")
    run.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    run.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    run.add_argument("--no-export", action="store_true", help="leave results/ as it is")
    hardware = run.add_argument_group("hardware: recorded, but no part of the question")
    hardware.add_argument("--accelerator", default="auto")
    hardware.add_argument(
        "--devices", default="1", help="a number, auto, -1 for all, or indices such as 0,1"
    )
    hardware.add_argument("--num-nodes", type=int, default=1)
    hardware.add_argument("--strategy", default="auto", help="Lightning's: auto, ddp, ddp_fork")
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
    from rudolph.config.experiment_file import load_experiment
    from rudolph.runs.runner import Job, experiment_files, keep_owner, require_own_experiments

    for flag in (*HARDWARE_FLAGS, "index", "jobs"):
        # Argparse makes an empty list of a value that is two dashes.
        if getattr(given, flag) == []:
            raise ValueError(f"--{flag.replace('_', '-')}: expected a value, got '--'")
    if given.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {given.jobs}")
    files = experiment_files(given.file)
    loaded = {file: load_experiment(file, given.settings) for file in files}
    require_own_experiments(list(loaded.values()), folders_here(), RESULTS_FOLDER)
    settings = tuple(given.settings)
    jobs = [
        Job(file, settings, run.name, run)
        for file, experiment in loaded.items()
        for run in experiment.runs
    ]
    if given.index is not None:
        if not 0 <= given.index < len(jobs):
            raise ValueError(f"--index must be 0 to {len(jobs) - 1}, got {given.index}")
        jobs = [jobs[given.index]]
    named = {job: (loaded[job.file], job.run) for job in jobs}
    hardware = hardware_of(given)
    for _, run in named.values():
        hardware.check(run.config)
    if hardware.warning:
        print_line(hardware.warning)
    if given.dry_run:
        print_runs(list(named.values()), list(loaded.values()))
        return 0
    for file in dict.fromkeys(job.file for job in named):
        keep_owner(loaded[file], folders_here())
    failed = execute_jobs(named, given, is_only=len(named) == 1)
    if given.index is None:
        for file, experiment in loaded.items():
            failed |= execute_search(file, experiment, named, given)
    return export_and_report(named, failed, given)


def print_runs(runs: list[Any], experiments: list[Any]) -> None:
    """Print a line for each run, and the number of trials of each search."""
    for number, (experiment, run) in enumerate(runs):
        beside = f"{experiment.name}  " if len(experiments) > 1 else ""
        print(f"{number}  {beside}{run.name}  {run.config.digest[:8]}")
    for experiment in experiments:
        if experiment.search is not None:
            tests = len(experiment.search.domains) * len(experiment.seeds)
            print(f"and {experiment.search.trials} trials, then {tests} tests of regions")


def execute_jobs(named: Any, given: Any, *, is_only: bool = False) -> dict[Any, str]:
    """Execute the runs of jobs; those that failed and why.

    A mistake in the only run that was asked for is raised, and one in the first that all share.
    """
    from rudolph.runs.runner import run_at_once

    place = run_context(given)
    failed: dict[Any, str] = {}
    if min(given.jobs, len(named)) == 1:
        others = () if is_only else [run for _, run in named.values()]
        for job, (experiment, run) in named.items():
            why = execute_run(experiment, run, place, is_only=is_only, others=others)
            failed |= {job: why} if why else {}
            others = ()
        return failed
    with stage_progress() as progress:
        for done, (job, why) in enumerate(run_at_once(list(named), place, number=given.jobs), 1):
            experiment, run = named[job]
            failed |= {job: why} if why else {}
            progress(
                "runs", done, len(named), f"{experiment.name} / {run.name}{why and ': '}{why}"
            )
    return failed


def execute_search(file: Path, experiment: Any, named: Any, given: Any) -> dict[Any, str]:
    """Execute a search round after round, which ``named`` gets too; what failed and why."""
    from rudolph.runs.runner import Job, search_of

    failed: dict[Any, str] = {}
    for runs in search_of(experiment, folders_here()):
        for run in runs:
            hardware_of(given).check(run.config)
        found = {
            Job(file, tuple(given.settings), run.name, run): (experiment, run) for run in runs
        }
        named |= found
        failed |= execute_jobs(found, given)
    return failed


def hardware_of(given: Any) -> Any:
    """Return the hardware that a command asks for; ``ValueError`` for what is not there."""
    from rudolph.runs.execution import Hardware

    hardware = Hardware(**{name: getattr(given, name) for name in HARDWARE_FLAGS})
    if given.jobs > 1 and hardware.world > 1:
        raise ValueError(
            f"--jobs: expected 1 with {hardware.world} devices, got {given.jobs}. "
            "Each run takes all of them"
        )
    return hardware


def run_context(given: Any) -> Any:
    """Where and on what the runs of a command are executed."""
    from rudolph.runs.runner import RunContext
    from rudolph.tracking.tracker import tracking_uri

    return RunContext(folders_here(), hardware_of(given), tracking_uri(Path.cwd()))


def export_and_report(named: Any, failed: Any, given: Any) -> int:
    """Export every experiment that has a finished run, and name the runs that failed."""
    from rudolph.runs.execution import is_main_process
    from rudolph.tracking.tracker import send_results, tracking_uri

    if not is_main_process():
        return 0
    experiments = {job.file: experiment for job, (experiment, _) in named.items()}
    ended = {job.file for job in named if job not in failed}
    faults = {}
    if given.settings:
        print_line(
            "results/ stay as they are: with settings of the command line it is another question"
        )
    elif not given.no_export:
        for file in sorted(experiments.keys() & ended):
            try:
                folder = write_results(experiments[file], folders_here())
            except (ValueError, OSError) as error:
                # The other experiments have results too.
                faults[file] = error_message(error)
                continue
            print_line(f"results: {folder}")
            send_results(experiments[file].name, folder, tracking_uri(Path.cwd()))
    for job, why in failed.items():
        experiment, run = named[job]
        print_line(f"failed: {experiment.name} / {run.name}: {why}")
    for file, fault in faults.items():
        print_line(f"no results: {experiments[file].name}: {fault}")
    return 1 if failed or faults else 0


def error_message(error: ValueError | OSError) -> str:
    """Return a mistake of the user, or of the system, in one line."""
    return explain_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())


def execute_run(
    experiment: Any, run: Any, place: Any, *, is_only: bool = False, others: Sequence[Any] = ()
) -> str:
    """Execute one run unless it is finished, and tell its scores; why it failed.

    A mistake in the only run that was asked for is raised, and one that ``others`` share.
    """
    from rudolph.reports.run_files import read_summary
    from rudolph.runs.execution import is_finished, is_main_process, run_folder
    from rudolph.runs.runner import failure_of, is_shared_mistake

    folder = run_folder(place.folders, experiment, run)
    print_line(f"{experiment.name} / {run.name} ({run.config.digest[:8]})")
    if is_finished(folder):
        print_line(f"  finished before: {folder}")
        return ""
    try:
        with stage_progress() as progress:
            why = failure_of(experiment, run, place, progress)
    except (ValueError, OSError) as error:
        if is_only or (others and is_shared_mistake(folder, run, others)):
            raise
        why = error_message(error)
    if why:
        print_line(f"  failed: {why}")
        return why
    if is_main_process():
        print_scores(read_summary(folder))
    print_line(f"  weights, samples and metrics: {folder}")
    return ""


def print_scores(summary: dict[str, Any]) -> None:
    for name, value in summary["metrics"].items():
        low, high = summary["intervals"].get(name, (None, None))
        interval = f"  [{low:.3g}, {high:.3g}]" if low is not None else ""
        chance = summary["chance"].get(name)
        against = f"  chance {chance:.3g}" if chance is not None else ""
        target = summary["target"].get(name)
        wanted = f"  target {target:g}" if target is not None else ""
        print_line(f"  {name:44} {value:8.4g}{interval}{against}{wanted}")


def show_experiment(given: Any) -> int:
    from rudolph.config.experiment_file import load_experiment
    from rudolph.config.run import RunConfig, run_yaml
    from rudolph.files.settings import json_schema

    if given.schema:
        print(json.dumps(json_schema(RunConfig), indent=1, ensure_ascii=False))
        return 0
    micro = given.micro_batch_size
    if micro is not None and micro < 1:
        raise ValueError(f"--micro-batch-size must be at least 1, got {micro}")
    loaded = load_experiment(given.file, given.settings)
    for number, run in enumerate(loaded.runs):
        print(f"# {number}: {run.name}, digest {run.config.digest}")
        for line in memory_lines(run.config, micro, has_checkpointing=given.checkpointing):
            print(f"# {line}")
        print(run_yaml(run.config))
    return 0


def memory_lines(config: Any, micro: int | None, *, has_checkpointing: bool) -> list[str]:
    """What the decoder's training will need on one device, before anything is allocated."""
    import torch

    from rudolph.models.rudolph.decoder import MaskedDecoder
    from rudolph.training.memory import training_memory
    from rudolph.training.optim import machine_precision
    from rudolph.training.tuning import apply_tuning

    with torch.device("meta"):
        model = MaskedDecoder(
            config.decoder.architecture, config.sequence_layout, config.vocabulary
        )
        apply_tuning(model, config.decoder.tuning)
    model.has_checkpointing = has_checkpointing
    size = micro or config.optim.global_batch_size
    need = training_memory(
        model,
        config.decoder.losses,
        config.optim,
        micro_batch_size=size,
        activation_bytes=4 if machine_precision() == "32-true" else 2,
    )
    parts = ("weights", "gradients", "optimizer", "activations")
    told = ", ".join(f"{name} {getattr(need, name) / 2**20:,.0f}" for name in parts)
    return [
        f"decoder: {need.trainable:,} of {need.total:,} parameters are trained",
        f"memory at {size} examples a device: {need.bytes / 2**20:,.0f} MiB ({told})",
    ]
