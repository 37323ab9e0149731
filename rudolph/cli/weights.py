"""Commands for weights: models, pull, convert, pack."""

from pathlib import Path
from typing import Any

from rudolph.runs.console import print_line, stage_progress


def add_weights(commands: Any) -> None:
    """Add the parsers of ``rudolph models``, ``pull``, ``convert`` and ``pack``."""
    models = commands.add_parser("models", help="list the released models and which are on disk")
    models.set_defaults(command=list_models)
    pull_release = commands.add_parser(
        "pull", help="download a released model and its dependencies"
    )
    pull_release.add_argument("names", nargs="+", metavar="NAME")
    pull_release.add_argument("--file", type=Path, help="use this local copy of the released file")
    pull_release.set_defaults(command=pull_models)
    convert = commands.add_parser(
        "convert", help="write weights in the format of the reference's packages"
    )
    convert.add_argument("source", help="a run, an MLflow run, a released name or a folder")
    convert.add_argument("folder", type=Path)
    convert.add_argument("--pickle", action="store_true", help="also write pytorch_model.bin")
    convert.set_defaults(command=convert_weights)
    pack_run_folder = commands.add_parser(
        "pack", help="write a small copy of a run for distribution, with a model card"
    )
    pack_run_folder.add_argument("run", help="a run's folder, or the id of an MLflow run")
    pack_run_folder.add_argument("folder", type=Path)
    pack_run_folder.add_argument(
        "settings", nargs="*", metavar="sampling.key=value", help="default sampling settings"
    )
    pack_run_folder.add_argument(
        "--int8", action="store_true", help="store the decoder in 8 bits instead of 16"
    )
    pack_run_folder.set_defaults(command=pack_run)


def list_models(args: Any) -> int:
    """Run ``rudolph models`` and return the exit code."""
    from rudolph.checkpoints.releases import RELEASED
    from rudolph.checkpoints.store import is_pulled, weights_home

    rows = [("name", "family", "parameters", "MB", "licence", "on disk", "file")]
    for name, release in RELEASED.items():
        count = release.num_parameters
        rows.append(
            (
                name,
                release.family,
                f"{count / 1e6:,.0f}M" if count else "",
                f"{release.megabytes:,}",
                release.licence,
                "yes" if is_pulled(name) else "gated" if release.is_gated else "no",
                f"{release.repository}/{release.file}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print_line(f"on disk: {weights_home()} (set RUDOLPH_WEIGHTS for another folder)")
    return 0


def pull_models(args: Any) -> int:
    """Run ``rudolph pull`` and return the exit code."""
    from rudolph.checkpoints.store import is_pulled, pull_release, release_of

    if args.file is not None and len(args.names) > 1:
        raise ValueError(f"--file: expected one name with it, got {len(args.names)}")
    names: list[str] = []
    for name in args.names:
        needed = () if args.file else release_of(name).needs
        names += [dependency for dependency in (*needed, name) if dependency not in names]
    for name in names:
        if is_pulled(name) and args.file is None:
            print_line(f"{name}: already on disk")
            continue
        with stage_progress() as progress:
            folder = pull_release(
                name,
                file=args.file,
                on_bytes=lambda file, done, total: progress(file, done, total, "bytes"),
            )
        print_line(f"{name}: {folder}")
    return 0


def convert_weights(args: Any) -> int:
    """Run ``rudolph convert`` and return the exit code."""
    from rudolph.cli.results import folders_here
    from rudolph.runs.resolve import export_reference, find_folder
    from rudolph.tracking.tracker import tracking_uri

    folder = find_folder(args.source, runs=folders_here().runs, uri=tracking_uri(Path.cwd()))
    for line in export_reference(folder, args.folder, has_pickle=args.pickle):
        print_line(line)
    return 0


def pack_run(args: Any) -> int:
    """Run ``rudolph pack`` and return the exit code."""
    from rudolph.cli.results import folders_here, local_run_folder
    from rudolph.runs.packing import MODEL_CARD, pack_run_folder

    folders = folders_here()
    with stage_progress() as progress:
        run = local_run_folder(args.run)
        settings = {"int8": args.int8, "settings": args.settings}
        pack_run_folder(run, args.folder, folders, progress, **settings)
    print_line(f"{args.folder / MODEL_CARD}: describe the model above the tables")
    return 0
