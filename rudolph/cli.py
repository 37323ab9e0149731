"""The verbs of ``rudolph``: arguments, progress and messages, nothing else.

Exit code 0: done; 1: a run failed; 2: a mistake of the user, told in one line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rudolph.console import say, silence_libraries, stage_progress

RESULTS = Path("results")
HARDWARE_FLAGS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "micro_batch_size",
    "num_workers",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    silence_libraries()
    try:
        return given.verb(given)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        say(f"rudolph: {error}")
        return 2
    except KeyboardInterrupt:
        say("rudolph: interrupted; the same command goes on from the last checkpoint")
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rudolph", description="A laboratory for text-image-text transformers."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add in (add_run, add_show, add_results, add_generate, add_caption, add_data):
        add(verbs)
    return parser


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
    run.set_defaults(verb=run_experiment)


def add_show(verbs: Any) -> None:
    show = verbs.add_parser("show", help="print the resolved runs of an experiment file")
    show.add_argument("file", type=Path)
    show.add_argument("settings", nargs="*", metavar="key=value")
    show.add_argument("--schema", action="store_true", help="the JSON Schema of the settings")
    show.set_defaults(verb=show_experiment)


def add_results(verbs: Any) -> None:
    export = verbs.add_parser("export", help="write results/ from the finished runs")
    export.add_argument("file", type=Path)
    export.set_defaults(verb=export_experiment)
    figures = verbs.add_parser("figures", help="redraw the figures of results/ from their CSV")
    figures.add_argument("experiment", nargs="?")
    figures.set_defaults(verb=redraw_figures)
    check = verbs.add_parser("check", help="check that results/ is whole and consistent")
    check.set_defaults(verb=check_results)
    sync = verbs.add_parser("sync", help="send to MLflow what a server that was away missed")
    sync.add_argument("--again", action="store_true", help="everything, for a store that was lost")
    sync.set_defaults(verb=sync_runs)


def add_sampling_arguments(verb: Any) -> None:
    verb.add_argument("--run", type=Path, help="a run's folder; by default the newest finished")
    verb.add_argument("-n", "--number", type=int, default=8)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--temperature", type=float)
    verb.add_argument("--top-k", type=int, help="filters are the run's where they are not given")
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--output", type=Path, help="path of the PNG; JSON is written beside it")


def add_generate(verbs: Any) -> None:
    generate = verbs.add_parser("generate", help="draw pictures for a text")
    generate.add_argument("text")
    add_sampling_arguments(generate)
    generate.add_argument("--guidance", type=float)
    generate.set_defaults(verb=generate_pictures)


def add_caption(verbs: Any) -> None:
    caption = verbs.add_parser("caption", help="describe a picture")
    caption.add_argument("picture", type=Path)
    add_sampling_arguments(caption)
    caption.set_defaults(verb=caption_picture)


def add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="build or inspect a dataset")
    kinds = data.add_subparsers(required=True, metavar="DATASET")
    emoji = kinds.add_parser("emoji", help="render the emoji set from a colour font and CLDR")
    emoji.add_argument("target", type=Path, help="folder to write")
    emoji.add_argument("--font", type=Path)
    emoji.add_argument("--size", type=int, default=64)
    emoji.set_defaults(verb=build_emoji)
    manifest = kinds.add_parser("manifest", help="report what a table of pairs holds")
    manifest.add_argument("table", type=str)
    manifest.add_argument("--image-size", type=int, default=256)
    manifest.set_defaults(verb=inspect_manifest)


def folders_here() -> Any:
    """A checkout is where the command is given."""
    from rudolph.execution import Folders

    return Folders(Path.cwd(), Path.cwd() / "runs")


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
    from rudolph.execution import is_main_process

    folders = folders_here()
    failed = [run.name for run in runs if not execute_run(loaded, run, given, folders)]
    if not is_main_process():
        return 0
    if given.settings:
        say("results/ stay as they are: with settings of the command line it is another question")
    elif not given.no_export and len(failed) < len(runs):
        say(f"results: {write_results(loaded, folders)}")
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def execute_run(loaded: Any, run: Any, given: Any, folders: Any) -> bool:
    """Execute one run unless it is finished; whether it is finished now."""
    from rudolph.execution import Hardware
    from rudolph.experiment import execute, is_finished, run_folder
    from rudolph.results.tracking import tracking_uri
    from rudolph.training.callbacks import NonFiniteLossError

    folder = run_folder(folders, loaded, run)
    say(f"{loaded.name} / {run.name} ({run.config.digest[:8]})")
    if is_finished(folder):
        say(f"  finished before: {folder}")
        return True
    hardware = Hardware(**{field: getattr(given, field) for field in HARDWARE_FLAGS})
    uri = tracking_uri(Path.cwd())
    try:
        with stage_progress() as progress:
            summary = execute(
                loaded, run, folders=folders, hardware=hardware, uri=uri, progress=progress
            )
    except NonFiniteLossError as error:
        say(f"  failed: {error}; the last checkpoint is kept in {folder}")
        return False
    print_scores(summary)
    say(f"  weights, samples and metrics: {folder}")
    return True


def write_results(loaded: Any, folders: Any) -> Path:
    from rudolph.results.report import Figure, Report
    from rudolph.results.store import export, write_index

    source = loaded.path
    if source.resolve().is_relative_to(Path.cwd()):
        source = source.resolve().relative_to(Path.cwd())
    grid = sorted({key for run in loaded.runs for key in run.grid})
    rows = ("variant", *grid) if any(run.variant for run in loaded.runs) else (*grid, "run")
    table, curves = loaded.report.table, loaded.report.curves
    figures = [Figure("curves", curves, by=rows[0])] if curves else []
    if table:
        figures.append(Figure("intervals", table, x="seed", by=rows[0]))
    report = Report(
        experiment=loaded.name,
        title=loaded.title,
        question=loaded.question,
        source=source.as_posix(),
        rows=rows,
        columns=table,
        figures=tuple(figures),
    )
    folder = export(
        folders.runs, RESULTS, report=report, digests={run.config.digest for run in loaded.runs}
    )
    write_index(RESULTS)
    return folder


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
    for number, run in enumerate(loaded.runs):
        print(f"# {number}: {run.name}, digest {run.config.digest}")
        print(to_yaml(run.config))
    return 0


def export_experiment(given: Any) -> int:
    from rudolph.config import load_experiment

    say(f"results: {write_results(load_experiment(given.file), folders_here())}")
    return 0


def redraw_figures(given: Any) -> int:
    from rudolph.results.store import redraw

    say("\n".join(map(str, redraw(RESULTS, experiment=given.experiment))))
    return 0


def check_results(given: Any) -> int:
    from rudolph.config import read_run
    from rudolph.results.store import check

    problems = check(RESULTS, digest=lambda path: read_run(path).digest)
    say("\n".join([*problems, f"{len(problems)} problems"]) if problems else "results are whole")
    return 1 if problems else 0


def sync_runs(given: Any) -> int:
    from rudolph.results.tracking import send_pending, tracking_uri

    sent = send_pending(folders_here().runs, tracking_uri(Path.cwd()), again=given.again)
    say(f"sent {sent.records} records of {sent.runs} runs; {sent.waiting} runs wait")
    return 1 if sent.waiting else 0


def sampling_of(config: Any, given: Any, *, guidance: float | None) -> Any:
    """A run's sampling with what the command line gives over it."""
    from dataclasses import replace

    filters = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p")}
    given_ones = {name: value for name, value in filters.items() if value is not None}
    return replace(config, **given_ones, **({} if guidance is None else {"guidance": guidance}))


def newest_run() -> Path:
    """The folder of the run that finished last."""
    runs = folders_here().runs
    finished = [
        path
        for path in runs.glob("*/*/summary.json")
        if json.loads(path.read_text())["status"] == "finished"
    ]
    if not finished:
        raise ValueError(f"{runs}: no finished run; `make quickstart` trains one, or give --run")
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def generate_pictures(given: Any) -> int:
    from rudolph.data.module import mixed_seed
    from rudolph.gallery import to_bytes
    from rudolph.results.figures import sample_grid
    from rudolph.stages import load_pipeline

    if given.number < 1:
        raise ValueError(f"-n must be at least 1, got {given.number}")
    folder = given.run or newest_run()
    pipeline, config = load_pipeline(folder)
    sampling = sampling_of(config.sampling.image, given, guidance=given.guidance)
    text = pipeline.texts("text_to_image", given.text)
    if text.num_cut:
        say(f"the text is too long: its last {text.num_cut} BPE ids are cut")
    seeds = [mixed_seed(given.seed, number) for number in range(given.number)]
    with stage_progress() as progress:
        pictures = pipeline.generate(
            [given.text],
            config=sampling,
            seeds=seeds,
            on_token=lambda done, total: progress("generate", done, total, ""),
        )
    path = given.output or Path("generated.png")
    sample_grid(to_bytes(pictures), [given.text] * len(seeds), path, columns=4)
    record = {
        "text": given.text,
        "run": str(folder),
        "seed": given.seed,
        "sampling": vars(sampling),
    }
    write_beside(path, record)
    return 0


def caption_picture(given: Any) -> int:
    import numpy as np
    import torch

    from rudolph.data.funnel import Rejected, centre_square, open_picture
    from rudolph.data.module import mixed_seed
    from rudolph.results.figures import sample_grid
    from rudolph.stages import load_pipeline

    folder = given.run or newest_run()
    pipeline, config = load_pipeline(folder)
    try:
        picture = open_picture(given.picture.read_bytes()).image
    except Rejected as error:
        raise ValueError(f"{given.picture}: {error}") from error
    image = np.asarray(centre_square(picture, config.data.image_size))
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    sampling = sampling_of(config.sampling.text, given, guidance=None)
    seeds = [mixed_seed(given.seed, number) for number in range(given.number)]
    captions = pipeline.caption(tensor, config=sampling, seeds=seeds)
    counts = {text: captions.count(text) for text in captions}
    for text, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:4}  {text}")
    path = given.output or Path("captioned.png")
    sample_grid([image] * len(counts), list(counts), path, columns=4)
    record = {"picture": str(given.picture), "run": str(folder), "seed": given.seed}
    write_beside(path, record | {"sampling": vars(sampling), "captions": counts})
    return 0


def write_beside(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    say(f"{path} and {beside}")


def build_emoji(given: Any) -> int:
    from rudolph.data.emoji_builder import FONT, build

    with stage_progress() as progress:
        report = build(
            given.target,
            font=given.font or FONT,
            size=given.size,
            on_progress=lambda done, total: progress("emoji", done, total, ""),
        )
    print(report)
    return 0


def inspect_manifest(given: Any) -> int:
    from rudolph.data.manifests import Manifest, ManifestConfig

    config = ManifestConfig(path=given.table, max_bad_share=1.0)
    with stage_progress() as progress:
        manifest = Manifest(
            config,
            split="train",
            image_size=given.image_size,
            progress=lambda done, total: progress("pictures", done, total, ""),
        )
    print(manifest.report.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
