"""A run as it is given away: small weights, its configuration, its scores, a model card.

The folder is a run's folder still: every verb that takes a run takes it.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from rudolph.config.run import RunConfig, read_run, run_yaml
from rudolph.families.rudolph import FILES as RUN_FILES
from rudolph.files.atomic import read_mapping, require_disjoint_paths, write_json, write_text
from rudolph.models.cpu.int8 import pack_int8
from rudolph.models.weights import save_tensors
from rudolph.reports.markdown import table_row
from rudolph.reports.report import fill
from rudolph.reports.report_cards import CARD, card_table, read_card
from rudolph.reports.run_files import ENVIRONMENT, SUMMARY, read_environment, read_summary
from rudolph.runs.execution import Folders, ProgressCallback
from rudolph.runs.resolve import load_run
from rudolph.runs.samples import generate_prompts
from rudolph.runs.stages.evaluation import evaluate_again

MADE = "made.json"
MODEL_CARD = "README.md"
DRAWN = "samples.png"
NEW_CARD = (
    "# {name}\n\n_What it is for, what it cannot do, and under which licence it may be used._"
)


def pack_run_folder(
    run: Path,
    target: Path,
    folders: Folders,
    progress: ProgressCallback,
    *,
    int8: bool = False,
    settings: Sequence[str] = (),
) -> None:
    """Write the folder of a finished run anew, small; its questions are asked of what is written.

    Text above the generated part of a model card that is there stays.

    Args:
        int8: the decoder's matrices in 8 bits with a scale a row; all else has 16.
        settings: ``sampling.key=value``, how it draws where nothing else is said.

    Raises:
        ValueError: when the run has not finished, its configuration names no questions, a
            setting is of anything but sampling, or the target is another run or meets this one.
    """
    for setting in settings:
        if not setting.startswith("sampling."):
            raise ValueError(f"settings of a packed run must be sampling.key=value, got {setting}")
    _needed(run / SUMMARY), _needed(run / ENVIRONMENT)
    status = read_summary(run)["status"]
    if status != "finished":
        raise ValueError(f"{run}: not a finished run, its status is {status}")
    _require_place(target, run)
    with _made_beside(target) as made:
        _write(run, made, int8=int8, settings=settings)
        evaluate_again(made, folders, progress)
        generate_samples(made)
        by_hand = target / MODEL_CARD
        new = NEW_CARD.format(name=read_summary(run)["experiment"])
        text = by_hand.read_text("utf-8") if by_hand.is_file() else new
        write_text(made / MODEL_CARD, fill(text, {"card": model_card(made)}))


def _require_place(target: Path, run: Path) -> None:
    """Raise ``ValueError`` for a target that holds weights which were not packed."""
    require_disjoint_paths(target, run, "folder")
    if (target / "config.yaml").exists() and not (target / MADE).exists():
        raise ValueError(
            f"folder: expected a new folder or one that `rudolph pack` wrote, got {target}, "
            f"a run without {MADE}. Give another path"
        )


@contextmanager
def _made_beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder whose files take their places in ``target`` when all are whole."""
    place = Path(os.path.realpath(target))
    made = place.with_name(f".{place.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        if (target / MADE).is_file():
            # An earlier call drew it; this one may have nothing to draw.
            (target / DRAWN).unlink(missing_ok=True)
        for path in sorted(path for path in made.rglob("*") if path.is_file()):
            put = place / path.relative_to(made)
            put.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, put)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(run: Path, target: Path, *, int8: bool, settings: Sequence[str]) -> None:
    """Write the small weights of a run, its configuration and how it was made."""
    summary, environment = read_summary(run), read_environment(run)
    pipeline, config = load_run(run)
    if not config.evaluation.evaluators:
        raise ValueError(f"{run}: its config.yaml names no evaluation.evaluators")
    checkpoints = target / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    decoder = pipeline.decoder.state_dict()
    save_tensors(pack_int8(decoder) if int8 else _halved(decoder), checkpoints / RUN_FILES[0])
    save_tensors(_halved(pipeline.vqgan.state_dict()), checkpoints / RUN_FILES[1])
    pipeline.tokenizer.save(checkpoints / RUN_FILES[2])
    write_text(target / "config.yaml", run_yaml(read_run(run / "config.yaml", settings)))
    kept = ("experiment", "run", "digest", "commit", "dirty", "seconds")
    made = {name: summary[name] for name in kept} | {"machine": environment["machine"]}
    made["bits"] = 8 if int8 else 16
    write_json(target / MADE, made)


def generate_samples(folder: Path) -> None:
    """Images of the fixed prompts by what was written, if there are such prompts."""
    pipeline, config = load_run(folder)
    if config.evaluation.grid_prompts:
        generate_prompts(pipeline, config, folder / DRAWN)


def model_card(folder: Path) -> str:
    """The generated part of a model card: what it is, what it cost, what it scores."""
    made = read_mapping(folder / MADE, run=str, seconds=dict, machine=dict)
    card = read_card(folder / CARD).assign(run=made["run"])
    head = [table_row(["", ""]), table_row(["---", "---"])]
    facts = [table_row(pair) for pair in _facts(folder, made)]
    drawn = [f"![drawn for fixed prompts]({DRAWN})", ""] if (folder / DRAWN).is_file() else []
    return "\n".join([*head, *facts, "", *drawn, *card_table(card, list(card["score"]))])


def _facts(folder: Path, made: dict[str, object]) -> list[tuple[str, str]]:
    pipeline, config = load_run(folder)
    seconds, machine = made["seconds"], made["machine"]
    assert isinstance(seconds, dict) and isinstance(machine, dict)
    layout, total = config.sequence_layout, sum(row.weight for row in config.data.mixture)
    side = layout.image_tokens_per_dim
    tasks = ", ".join(f"{row.name} {row.weight / total:.0%}" for row in config.data.mixture)
    where = ", ".join([f"{machine['cores']} cores ({machine['processor']})", *machine["gpus"]])
    size = sum((folder / "checkpoints" / name).stat().st_size for name in RUN_FILES)
    return [
        ("decoder", f"{_sizes(config)}, {_millions(pipeline.decoder)}"),
        (
            "VQ-GAN",
            f"{config.data.image_size} pixels in {side} x {side} tokens of "
            f"{config.vqgan.quantizer.num_codes} codes, {_millions(pipeline.vqgan)}",
        ),
        (
            "text",
            f"{pipeline.tokenizer.vocab_size} BPE ids; {layout.left_text_length} tokens left, "
            f"{layout.right_text_length} right",
        ),
        ("examples", f"train split of {', '.join(config.data.datasets)}: {tasks}"),
        ("trained", f"{sum(seconds.values()) / 60:.0f} minutes on {where}"),
        ("from", f"`{made['experiment']}` {made['run']}, commit `{str(made['commit'])[:10]}`"),
        ("weights", f"decoder {made['bits']} bits, VQ-GAN 16, {size / 1e6:.1f} MB"),
    ]


def _sizes(config: RunConfig) -> str:
    return f"{config.decoder.num_layers} layers of {config.decoder.hidden_size}"


def _millions(model: nn.Module) -> str:
    return f"{sum(each.numel() for each in model.parameters()) / 1e6:.1f}M parameters"


def _halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices in 16 bits; vectors are small, and counts among them may be large."""
    return {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in tensors.items()
    }


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path.parent}: not a finished run, it lacks {path.name}")
    return path
