"""Verbs of weights: models, pull, convert, pack."""

from pathlib import Path
from typing import Any

from rudolph.runs.console import print_line, stage_progress


def add_weights(verbs: Any) -> None:
    models = verbs.add_parser("models", help="list the released models and what is on this disk")
    models.set_defaults(verb=list_models)
    pull_release = verbs.add_parser("pull", help="get a released model and what it needs")
    pull_release.add_argument("names", nargs="+", metavar="NAME")
    pull_release.add_argument("--file", type=Path, help="the released file, if it is here already")
    pull_release.set_defaults(verb=pull_models)
    convert = verbs.add_parser("convert", help="write weights for the reference's packages")
    convert.add_argument("source", help="a run, an MLflow run, a released name or a folder")
    convert.add_argument("folder", type=Path)
    convert.add_argument("--pickle", action="store_true", help="pytorch_model.bin as well")
    convert.set_defaults(verb=convert_weights)
    pack_run_folder = verbs.add_parser(
        "pack", help="write a run to give away: small, with a model card"
    )
    pack_run_folder.add_argument("run", help="a run's folder, or the id of an MLflow run")
    pack_run_folder.add_argument("folder", type=Path)
    pack_run_folder.add_argument(
        "settings", nargs="*", metavar="sampling.key=value", help="how it draws by itself"
    )
    pack_run_folder.add_argument(
        "--int8", action="store_true", help="the decoder in 8 bits instead of 16"
    )
    pack_run_folder.set_defaults(verb=pack_run)


def list_models(given: Any) -> int:
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
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print_line(f"on disk: {weights_home()} (RUDOLPH_WEIGHTS names another place)")
    return 0


def pull_models(given: Any) -> int:
    from rudolph.checkpoints.store import is_pulled, pull_release, release_of

    if given.file is not None and len(given.names) > 1:
        raise ValueError("--file is the file of one model: give one name")
    wanted: list[str] = []
    for name in given.names:
        needed = () if given.file else release_of(name).needs
        wanted += [each for each in (*needed, name) if each not in wanted]
    for name in wanted:
        if is_pulled(name) and given.file is None:
            print_line(f"{name}: is here already")
            continue
        with stage_progress() as progress:
            folder = pull_release(
                name,
                file=given.file,
                on_bytes=lambda file, done, total: progress(file, done, total, "bytes"),
            )
        print_line(f"{name}: {folder}")
    return 0


def convert_weights(given: Any) -> int:
    from rudolph.cli.results import folders_here
    from rudolph.runs.resolve import export_reference, find_folder
    from rudolph.tracking.tracker import tracking_uri

    folder = find_folder(given.source, runs=folders_here().runs, uri=tracking_uri(Path.cwd()))
    for line in export_reference(folder, given.folder, has_pickle=given.pickle):
        print_line(line)
    return 0


def pack_run(given: Any) -> int:
    from rudolph.cli.results import folders_here, local_run_folder
    from rudolph.runs.packing import MODEL_CARD, pack_run_folder

    folders = folders_here()
    with stage_progress() as progress:
        run = local_run_folder(given.run)
        settings = {"int8": given.int8, "settings": given.settings}
        pack_run_folder(run, given.folder, folders, progress, **settings)
    print_line(f"{given.folder / MODEL_CARD}: say above its tables what the model is for")
    return 0
