"""Verbs of datasets: data emoji, emoji-names, manifest, fusion-brain."""

from pathlib import Path
from typing import Any

from rudolph.console import stage_progress


def add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="build or inspect a dataset")
    kinds = data.add_subparsers(required=True, metavar="DATASET")
    emoji = kinds.add_parser("emoji", help="render the emoji set from a colour font and CLDR")
    emoji.add_argument("target", type=Path, help="folder to write")
    emoji.add_argument("--font", type=Path)
    emoji.add_argument("--size", type=int, default=64)
    emoji.set_defaults(verb=build_emoji)
    names = kinds.add_parser("emoji-names", help="a table of pairs for emoji of another style")
    names.add_argument("folder", type=Path, help="PNG files named by code points: 1f600.png")
    names.set_defaults(verb=name_emoji)
    manifest = kinds.add_parser("manifest", help="report what a table of pairs holds")
    manifest.add_argument("table", type=str)
    manifest.add_argument("--image-size", type=int, default=256)
    manifest.set_defaults(verb=inspect_manifest)
    brain = kinds.add_parser("fusion-brain", help="score answers as Fusion Brain Challenge 2 does")
    brain.add_argument("task", choices=("text_qa", "math_qa", "visual_qa", "text_recognition"))
    for name in ("questions", "truths", "answers"):
        brain.add_argument(name, type=Path, help="JSON of the challenge")
    brain.add_argument("--plain", action="store_true", help="its rules without the quirks")
    brain.set_defaults(verb=score_fusion_brain)


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


def name_emoji(given: Any) -> int:
    from rudolph.data.emoji import name_pictures

    number, strangers = name_pictures(given.folder)
    table = given.folder / "captions.csv"
    print(f"{table}: {number} pairs; {len(strangers)} pictures have no name")
    return 0


def inspect_manifest(given: Any) -> int:
    from rudolph.data.manifests import Manifest
    from rudolph.data.tables import ManifestConfig

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


def score_fusion_brain(given: Any) -> int:
    from rudolph.data.fusion_brain_files import read_tasks
    from rudolph.evaluation import fusion_brain
    from rudolph.evaluation.statistics import mean_interval

    truths = fusion_brain.variants(read_tasks(given.questions, given.truths))
    answers = fusion_brain.first_texts(read_tasks(given.questions, given.answers))
    quirks = fusion_brain.PLAIN if given.plain else fusion_brain.CHALLENGE
    values = fusion_brain.TEXT_SCORES[given.task](answers, truths, quirks)
    value, low, high = mean_interval(values, seed=0)
    threshold = fusion_brain.THRESHOLDS[given.task]
    print(
        f"{given.task}: {value:.4f} [{low:.4f}, {high:.4f}] of {len(values)}; "
        f"prizes from {threshold}; quirks: {quirks}"
    )
    return 0
