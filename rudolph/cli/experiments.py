"""Commands for experiments: run, show."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rudolph.cli.results import RESULTS_FOLDER, folders_here, write_results
from rudolph.files.atomic import explain_os_error
from rudolph.runs.console import print_line, stage_progress
from rudolph.training.hardware_flags import add_flags, flags_of, option_of


def add_run(commands: Any) -> None:
    """Add the parser of ``rudolph run``."""
    run = commands.add_parser("run", help="run an experiment file; finished runs are skipped")
    run.add_argument("file", type=Path, help="an experiment file, or a folder of them")
    run.add_argument("settings", nargs="*", metavar="key=value", help="override the file")
    run.add_argument("--index", type=int, help="only run number INDEX, for a job array")
    run.add_argument("--jobs", type=int, default=1, help="parallel runs, which share the cores")
    run.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    run.add_argument("--no-export", action="store_true", help="leave results/ as it is")
    add_flags(run.add_argument_group("hardware (recorded, but not part of the experiment)"))
    run.set_defaults(command=run_experiment)


def add_show(commands: Any) -> None:
    """Add the parser of ``rudolph show``."""
    show = commands.add_parser("show", help="print the resolved runs of an experiment file")
    show.add_argument("file", type=Path)
    show.add_argument("settings", nargs="*", metavar="key=value")
    memory = show.add_argument_group("hardware for the memory estimate")
    add_flags(memory, ("micro_batch_size", "activation_checkpointing"))
    show.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of the settings"
    )
    show.set_defaults(command=show_experiment)


def run_experiment(args: Any) -> int:
    """Run ``rudolph run`` and return the exit code.

    Raises:
        ValueError: If a flag or the experiment file is invalid.
    """
    from rudolph.config.experiment_file import load_experiment
    from rudolph.runs.runner import Job, experiment_files, require_own_experiments, write_owner

    for name, value in (flags_of(args) | {"index": args.index, "jobs": args.jobs}).items():
        # argparse turns the value "--" into an empty list.
        if value == []:
            raise ValueError(f"{option_of(name)}: expected a value, got '--'")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    files = experiment_files(args.file)
    loaded = {file: load_experiment(file, args.settings) for file in files}
    require_own_experiments(list(loaded.values()), folders_here(), RESULTS_FOLDER)
    settings = tuple(args.settings)
    jobs = [
        Job(file, settings, run.name, run)
        for file, experiment in loaded.items()
        for run in experiment.runs
    ]
    if args.index is not None:
        if not 0 <= args.index < len(jobs):
            raise ValueError(f"--index must be 0 to {len(jobs) - 1}, got {args.index}")
        jobs = [jobs[args.index]]
    runs_of_jobs = {job: (loaded[job.file], job.run) for job in jobs}
    hardware = hardware_of(args)
    for _, run in runs_of_jobs.values():
        hardware.check(run.config)
    if hardware.warning:
        print_line(hardware.warning)
    if args.dry_run:
        print_runs(list(runs_of_jobs.values()), list(loaded.values()))
        return 0
    for file in dict.fromkeys(job.file for job in runs_of_jobs):
        write_owner(loaded[file], folders_here())
        print_cost(loaded[file])
    failed = execute_jobs(runs_of_jobs, args, is_only=len(runs_of_jobs) == 1)
    if args.index is None:
        for file, experiment in loaded.items():
            failed |= execute_search(file, experiment, runs_of_jobs, args)
    return export_and_report(runs_of_jobs, failed, args)


def print_cost(experiment: Any) -> None:
    """Print the time of the runs in an experiment's results, as an estimate for new runs."""
    from rudolph.reports.report import cost_of

    folder = RESULTS_FOLDER / experiment.name
    if cost := cost_of(folder):
        print_line(f"{experiment.name}: {folder} has {cost}")


def print_runs(runs: list[Any], experiments: list[Any]) -> None:
    """Print one line per run and the number of trials of each search."""
    for number, (experiment, run) in enumerate(runs):
        prefix = f"{experiment.name}  " if len(experiments) > 1 else ""
        print(f"{number}  {prefix}{run.name}  {run.config.digest[:8]}")
    for experiment in experiments:
        if experiment.search is not None:
            num_tests = len(experiment.search.domains) * len(experiment.seeds)
            print(f"and {experiment.search.trials} trials, then {num_tests} region tests")


def execute_jobs(runs_of_jobs: Any, args: Any, *, is_only: bool = False) -> dict[Any, str]:
    """Execute the runs of jobs and return the failed jobs with their error messages.

    Args:
        runs_of_jobs: Experiment and run of each job, keyed by job.
        args: Arguments of the command.
        is_only: Whether this is the only run of the command.

    Raises:
        ValueError: If the only run has a user error, or if the first run has one that all runs
            share.
        OSError: In the same cases, if a file cannot be read or written.
    """
    from rudolph.runs.runner import run_parallel

    context = run_context(args)
    failed: dict[Any, str] = {}
    if min(args.jobs, len(runs_of_jobs)) == 1:
        others = () if is_only else [run for _, run in runs_of_jobs.values()]
        for job, (experiment, run) in runs_of_jobs.items():
            error = execute_run(experiment, run, context, is_only=is_only, others=others)
            failed |= {job: error} if error else {}
            others = ()
        return failed
    with stage_progress() as progress:
        for done, (job, error) in enumerate(
            run_parallel(list(runs_of_jobs), context, number=args.jobs), 1
        ):
            experiment, run = runs_of_jobs[job]
            failed |= {job: error} if error else {}
            progress(
                "runs",
                done,
                len(runs_of_jobs),
                f"{experiment.name} / {run.name}{error and ': '}{error}",
            )
    return failed


def execute_search(file: Path, experiment: Any, runs_of_jobs: Any, args: Any) -> dict[Any, str]:
    """Execute a search round by round and return the failed jobs with their error messages.

    The jobs are added to ``runs_of_jobs``.
    """
    from rudolph.runs.runner import Job, search_of

    failed: dict[Any, str] = {}
    for runs in search_of(experiment, folders_here()):
        for run in runs:
            hardware_of(args).check(run.config)
        round_jobs = {
            Job(file, tuple(args.settings), run.name, run): (experiment, run) for run in runs
        }
        runs_of_jobs |= round_jobs
        failed |= execute_jobs(round_jobs, args)
    return failed


def hardware_of(args: Any) -> Any:
    """Return the hardware flags of a command.

    Raises:
        ValueError: If the machine does not support them, or parallel runs need several devices.
    """
    from rudolph.runs.execution import Hardware

    hardware = Hardware(**flags_of(args))
    if args.jobs > 1 and hardware.world > 1:
        raise ValueError(
            f"--jobs: expected 1 with {hardware.world} devices, got {args.jobs}. "
            "Each run takes all of them"
        )
    return hardware


def run_context(args: Any) -> Any:
    """Return the folders, the hardware and the tracking server of a command."""
    from rudolph.runs.runner import RunContext
    from rudolph.tracking.tracker import tracking_uri

    return RunContext(folders_here(), hardware_of(args), tracking_uri(Path.cwd()))


def export_and_report(runs_of_jobs: Any, failed: Any, args: Any) -> int:
    """Export every experiment with a finished run and print the failed runs.

    Returns:
        The exit code.
    """
    from rudolph.tracking.tracker import send_results, tracking_uri

    if not hardware_of(args).is_main_process:
        return 0
    experiments = {job.file: experiment for job, (experiment, _) in runs_of_jobs.items()}
    finished_files = {job.file for job in runs_of_jobs if job not in failed}
    export_errors = {}
    if args.settings:
        print_line(
            "results/ is unchanged: settings on the command line make it another experiment. "
            "For a page, write them into the file; finished runs are reused"
        )
    elif not args.no_export:
        for file in sorted(experiments.keys() & finished_files):
            try:
                folder = write_results(experiments[file], folders_here())
            except (ValueError, OSError) as error:
                # A failed export must not stop the export of the other experiments.
                export_errors[file] = error_message(error)
                continue
            print_results(experiments[file], folder)
            send_results(experiments[file].name, folder, tracking_uri(Path.cwd()))
    for job, message in failed.items():
        experiment, run = runs_of_jobs[job]
        print_line(f"failed: {experiment.name} / {run.name}: {message}")
    for file, message in export_errors.items():
        print_line(f"no results: {experiments[file].name}: {message}")
    return 1 if failed or export_errors else 0


def print_results(experiment: Any, folder: Path) -> None:
    """Print where the page, the images and the curves are, and a command that uses the model."""
    from rudolph.runs.samples import grid_prompts_of
    from rudolph.tracking.tracker import tracking_uri

    print_line(f"results: {folder}")
    print_line(f"  page: {folder / 'README.md'}")
    for image in sorted((folder / "samples").glob("*-grid.png"))[:1]:
        print_line(f"  images: {image}")
    uri = tracking_uri(Path.cwd())
    is_local = uri.startswith("sqlite:")
    print_line(f"  curves: {'make mlflow, then http://127.0.0.1:5000' if is_local else uri}")
    prompts = grid_prompts_of(experiment.runs[-1].config)
    command = f'generate "{prompts[0]}" --model newest' if prompts else "report-card newest"
    print_line(f"  next: rudolph {command}")


def error_message(error: ValueError | OSError) -> str:
    """Return a user or system error as one line."""
    return explain_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())


def execute_run(
    experiment: Any, run: Any, context: Any, *, is_only: bool = False, others: Sequence[Any] = ()
) -> str:
    """Run unless already finished and print the scores. Return the error message, else "".

    Args:
        experiment: Experiment of the run.
        run: The run.
        context: Folders, hardware and tracking server.
        is_only: Whether this is the only run of the command; its user errors are raised.
        others: Other runs; a user error that would end all of them is raised.

    Raises:
        ValueError: For a user error in the only run, or in all ``others``.
        OSError: In the same cases, if a file cannot be read or written.
    """
    from rudolph.runs.execution import is_finished, run_folder
    from rudolph.runs.runner import is_shared_error, run_or_error
    from rudolph.tracking.run_directory import RunDirectory

    folder = run_folder(context.folders, experiment, run)
    print_line(f"{experiment.name} / {run.name} ({run.config.digest[:8]})")
    if is_finished(folder):
        print_line(f"  already finished: {folder}")
        return ""
    try:
        with stage_progress() as progress:
            message = run_or_error(experiment, run, context, progress)
    except (ValueError, OSError) as error:
        if is_only or (others and is_shared_error(folder, run, others)):
            raise
        message = error_message(error)
    if message:
        print_line(f"  failed: {message}")
        return message
    if context.hardware.is_main_process:
        print_scores(RunDirectory(folder).read_summary())
    print_line(f"  weights, samples and metrics: {folder}")
    return ""


def print_scores(summary: dict[str, Any]) -> None:
    """Print one line per metric with its interval, chance level and target."""
    for name, value in summary["metrics"].items():
        low, high = summary["intervals"].get(name, (None, None))
        interval = f"  [{low:.3g}, {high:.3g}]" if low is not None else ""
        chance = summary["chance"].get(name)
        chance_text = f"  chance {chance:.3g}" if chance is not None else ""
        target = summary["target"].get(name)
        target_text = f"  target {target:g}" if target is not None else ""
        print_line(f"  {name:44} {value:8.4g}{interval}{chance_text}{target_text}")


def show_experiment(args: Any) -> int:
    """Run ``rudolph show`` and return the exit code."""
    from rudolph.config.experiment_file import load_experiment
    from rudolph.config.run import RunConfig, run_yaml
    from rudolph.files.settings import json_schema

    if args.schema:
        print(json.dumps(json_schema(RunConfig), indent=1, ensure_ascii=False))
        return 0
    micro = args.micro_batch_size
    if micro is not None and micro < 1:
        raise ValueError(f"--micro-batch-size must be at least 1, got {micro}")
    loaded = load_experiment(args.file, args.settings)
    for number, run in enumerate(loaded.runs):
        print(f"# {number}: {run.name}, digest {run.config.digest}")
        for line in memory_lines(
            run.config, micro, has_checkpointing=args.activation_checkpointing
        ):
            print(f"# {line}")
        print(run_yaml(run.config))
    return 0


def memory_lines(config: Any, micro: int | None, *, has_checkpointing: bool) -> list[str]:
    """Return the parameter counts, and for a decoder the training memory per device in MiB.

    Nothing is allocated: the model is built on the meta device.
    """
    from rudolph.families.registry import family_of
    from rudolph.models.rudolph.decoder import MaskedDecoder
    from rudolph.models.weights import meta_device
    from rudolph.training.memory import training_memory
    from rudolph.training.optim import machine_precision
    from rudolph.training.tuning import apply_tuning

    family = family_of(config.model)
    with meta_device():
        model = family.empty(config)
        if not isinstance(model, MaskedDecoder):
            total = sum(parameter.numel() for parameter in model.parameters())
            return [f"{family.stage}: {total:,} parameters"]
        apply_tuning(model, config.model.tuning)
    model.has_checkpointing = has_checkpointing
    batch_size = micro or config.optim.global_batch_size
    memory = training_memory(
        model,
        config.model.losses,
        config.optim,
        micro_batch_size=batch_size,
        activation_bytes=4 if machine_precision() == "32-true" else 2,
    )
    parts = ("weights", "gradients", "optimizer", "activations")
    parts_text = ", ".join(f"{name} {getattr(memory, name) / 2**20:,.0f}" for name in parts)
    return [
        f"decoder: {memory.trainable:,} of {memory.total:,} parameters are trained",
        f"memory at {batch_size} examples per device: {memory.bytes / 2**20:,.0f} MiB "
        f"({parts_text})",
    ]
