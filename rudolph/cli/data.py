"""Commands for datasets: emoji, manifest, pack, verify, documents, fusion-brain."""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rudolph.runs.console import stage_progress

# Layouts of ``data documents``; the help must not import their readers.
LAYOUT_NAMES = ("llava", "mmc4", "obelics")
# A table with a larger fraction of bad rows is an error, unless --max-bad-fraction allows it.
MAX_BAD_FRACTION = 0.5


def add_data(commands: Any) -> None:
    """Add the parsers of ``rudolph data``."""
    data = commands.add_parser("data", help="build or inspect a dataset")
    kinds = data.add_subparsers(required=True, metavar="DATASET")
    emoji = kinds.add_parser("emoji", help="render the emoji set from a colour font and CLDR")
    emoji.add_argument("target", type=Path, help="folder to write")
    emoji.add_argument("--font", type=Path)
    emoji.add_argument("--size", type=int, default=64)
    emoji.set_defaults(command=build_emoji)
    names = kinds.add_parser("emoji-names", help="write a table of pairs for emoji images")
    names.add_argument("folder", type=Path, help="PNG files named by code points: 1f600.png")
    names.set_defaults(command=name_emoji)
    manifest = kinds.add_parser("manifest", help="check a table of pairs and report its contents")
    manifest.add_argument("table", type=str)
    manifest.add_argument("--image-size", type=int, default=256)
    add_columns(manifest)
    manifest.add_argument(
        "--max-bad-fraction",
        type=float,
        metavar="FRACTION",
        help="accept open quotes, and this fraction of bad rows (default: 0.5, no open quotes)",
    )
    manifest.set_defaults(command=inspect_manifest)
    add_packing(kinds)
    add_documents(kinds)
    brain = kinds.add_parser("fusion-brain", help="score answers as Fusion Brain Challenge 2 does")
    brain.add_argument("task", choices=("text_qa", "math_qa", "visual_qa", "text_recognition"))
    for name in ("questions", "truths", "answers"):
        brain.add_argument(name, type=Path, help="JSON of the challenge")
    brain.add_argument("--plain", action="store_true", help="use its rules without the quirks")
    brain.set_defaults(command=score_fusion_brain)


def add_packing(kinds: Any) -> None:
    """Add the parsers of ``rudolph data pack`` and ``rudolph data verify``."""
    pack = kinds.add_parser("pack", help="pack pairs into shards that training reads lazily")
    pack.add_argument("source", help="table of pairs, or folder of tar files of img2dataset")
    pack.add_argument("folder", type=Path, help="folder to write, or to continue")
    add_columns(pack)
    pack.add_argument("--jobs", type=int, default=1, help="number of processes (default: 1)")
    pack.add_argument(
        "--max-bad-fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        metavar="FRACTION",
        help="accept this fraction of bad rows (default: 0.5)",
    )
    pack.set_defaults(command=pack_source)
    verify = kinds.add_parser(
        "verify", help="compare the shards of packed pairs with their digests"
    )
    verify.add_argument("folder", type=Path)
    verify.set_defaults(command=verify_shards)


def add_columns(parser: Any) -> None:
    """Add the options that name the columns of a table."""
    for name in ("image", "caption", "question"):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {name}s")
    parser.add_argument(
        "--answers", metavar="FILE", help="file of answers to the questions of a .json"
    )


def columns_of(args: Any) -> dict[str, str]:
    """Return the settings of a table that ``add_columns`` parsed."""
    keys = ("image_column", "caption_column", "question_column", "answers")
    return {name: getattr(args, name) for name in keys if getattr(args, name) is not None}


def add_documents(kinds: Any) -> None:
    """Add the parser of ``rudolph data documents``."""
    documents = kinds.add_parser(
        "documents", help="check files of documents, report their contents, write them again"
    )
    documents.add_argument("path", type=str, help="a file, or a folder of files")
    documents.add_argument("--layout", choices=LAYOUT_NAMES, required=True)
    documents.add_argument("--images", metavar="FOLDER", help="folder of the image paths")
    documents.add_argument("--max-images", type=int, metavar="N", help="cut before image N + 1")
    documents.add_argument(
        "--drop-bad-images", action="store_true", help="leave out bad images of mmc4 and obelics"
    )
    documents.add_argument("--image-size", type=int, default=256)
    documents.add_argument("--max-bad-fraction", type=float, default=MAX_BAD_FRACTION)
    documents.add_argument(
        "--write", type=Path, metavar="FILE", help="write the usable documents, paths unchanged"
    )
    documents.add_argument("--as", dest="write_layout", choices=LAYOUT_NAMES)
    documents.set_defaults(command=inspect_documents)


def build_emoji(args: Any) -> int:
    """Run ``rudolph data emoji`` and return the exit code."""
    from rudolph.data.datasets.emoji_builder import FONT, build_emoji_set

    with stage_progress() as progress:
        report = build_emoji_set(
            args.target,
            font=args.font or FONT,
            size=args.size,
            on_progress=lambda done, total: progress("emoji", done, total, ""),
        )
    print(report)
    return 0


def name_emoji(args: Any) -> int:
    """Run ``rudolph data emoji-names`` and return the exit code."""
    from rudolph.data.datasets.emoji import write_emoji_tables

    num_pairs, unnamed = write_emoji_tables(args.folder)
    table = args.folder / "captions.csv"
    print(f"{table}: {num_pairs} pairs; {len(unnamed)} images have no name")
    return 0


def inspect_manifest(args: Any) -> int:
    """Run ``rudolph data manifest`` and return the exit code.

    Raises:
        ValueError: If too many rows are bad, or a quote is left open.
    """
    from rudolph.data.datasets.manifests import examine_table, splits_of_images
    from rudolph.data.datasets.tables import ManifestConfig

    is_strict = args.max_bad_fraction is None
    max_bad_fraction = MAX_BAD_FRACTION if is_strict else args.max_bad_fraction
    config = ManifestConfig(path=args.table, max_bad_fraction=max_bad_fraction, **columns_of(args))
    with stage_progress() as progress:
        table, entries, report = examine_table(
            config,
            image_size=args.image_size,
            progress=lambda done, total: progress("images", done, total, ""),
        )
    print(report.summary())
    splits = splits_of_images(entry.sha256 for entry in entries)
    print_splits(splits[entry.sha256] for entry in entries)
    if is_strict:
        report.require_closed_quotes(str(table))
    report.require_usable(str(table), max_bad_fraction=max_bad_fraction)
    return 0


def pack_source(args: Any) -> int:
    """Run ``rudolph data pack`` and return the exit code.

    Raises:
        ValueError: If too many rows are bad, or the source or the folder cannot be used.
    """
    from rudolph.data.datasets.tables import ManifestConfig
    from rudolph.data.shards.packing import LOCK, pack_pairs, require_own_folder
    from rudolph.data.shards.sources import open_source
    from rudolph.tracking.event_log import file_lock

    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    config = ManifestConfig(
        path=args.source, max_bad_fraction=args.max_bad_fraction, **columns_of(args)
    )
    # Checked before the lock creates the folder.
    source = open_source(config)
    require_own_folder(args.folder)
    with file_lock(args.folder / LOCK, 0) as is_alone, stage_progress() as progress:
        if not is_alone:
            raise ValueError(f"{args.folder}: another process packs into this folder")
        report = pack_pairs(
            source,
            args.folder,
            num_workers=args.jobs,
            progress=lambda done, total: progress("parts", done, total, ""),
        )
    print(report.summary())
    print(f"train with data: {{dataset: packed, packed: {{path: {args.folder}}}}}")
    return 0


def verify_shards(args: Any) -> int:
    """Run ``rudolph data verify``; return 1 if a shard is missing or damaged, else 0."""
    from rudolph.data.shards.layout import read_shards
    from rudolph.data.shards.packing import faults_of_shards

    splits = read_shards(args.folder)
    total, faults = sum(map(len, splits.values())), []
    with stage_progress() as progress:
        for done, fault in enumerate(faults_of_shards(args.folder, splits), start=1):
            progress("shards", done, total, "")
            faults += [fault] if fault else []
    for fault in faults:
        print(fault)
    num_rows = sum(shard.rows for shards in splits.values() for shard in shards)
    print(f"{total} shards of {num_rows} pairs: {len(faults)} damaged")
    return 1 if faults else 0


def inspect_documents(args: Any) -> int:
    """Run ``rudolph data documents`` and return the exit code.

    Raises:
        ValueError: If too many rows are bad, a flag does not suit the layout, or a document cannot
            be written in another one.
    """
    from rudolph.data.datasets.document_files import document_config, examine_documents
    from rudolph.data.datasets.document_layouts import write_documents

    if args.drop_bad_images and args.layout == "llava":
        raise ValueError("--drop-bad-images: expected layout mmc4 or obelics, got llava")
    keys = ["path", "images", "max_images", "max_bad_fraction"]
    keys += ["drop_bad_images"] * args.drop_bad_images
    config = document_config(args.layout, **{name: getattr(args, name) for name in keys})
    with stage_progress() as progress:
        examined = examine_documents(
            config,
            image_size=args.image_size,
            progress=lambda done, total: progress("documents", done, total, ""),
        )
    print(examined.report.summary())
    print_splits(entry.split for entry in examined.entries)
    examined.report.require_usable(args.path, max_bad_fraction=args.max_bad_fraction)
    if args.write is not None:
        documents = (examined.document(entry, config) for entry in examined.entries)
        write_documents(args.write, documents, args.write_layout or args.layout)
        print(f"{args.write}: {len(examined.entries)} documents")
    return 0


def print_splits(names: Iterable[str]) -> None:
    """Print how many examples each split has."""
    splits = Counter(names)
    print(", ".join(f"{name}: {splits[name]}" for name in ("train", "validation", "test")))
    # The report must appear above an error message about the table.
    sys.stdout.flush()


def score_fusion_brain(args: Any) -> int:
    """Run ``rudolph data fusion-brain`` and return the exit code."""
    from rudolph.data.datasets.fusion_brain_files import read_tasks
    from rudolph.evaluation.metrics import fusion_brain
    from rudolph.evaluation.statistics import mean_interval

    truths = fusion_brain.variants(read_tasks(args.questions, args.truths))
    answers = fusion_brain.first_texts(read_tasks(args.questions, args.answers))
    quirks = fusion_brain.NO_QUIRKS if args.plain else fusion_brain.CHALLENGE_QUIRKS
    values = fusion_brain.TEXT_SCORES[args.task](answers, truths, quirks)
    value, low, high = mean_interval(values, seed=0)
    threshold = fusion_brain.THRESHOLDS[args.task]
    print(
        f"{args.task}: {value:.4f} [{low:.4f}, {high:.4f}] of {len(values)}; "
        f"prizes from {threshold}; quirks: {quirks}"
    )
    return 0
