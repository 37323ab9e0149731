"""Packing of a run for distribution: small weights, configuration, scores and a model card.

The packed folder is still a run folder, so every command that takes a run accepts it.
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
from rudolph.reports.report_cards import card_table, read_card
from rudolph.reports.schema import CARD
from rudolph.runs.execution import Folders, ProgressCallback
from rudolph.runs.resolve import load_run
from rudolph.runs.samples import generate_prompts
from rudolph.runs.stages.evaluation import evaluate_again
from rudolph.tracking.run_directory import RunDirectory

MADE = "made.json"
MODEL_CARD = "README.md"
SAMPLES_FILE = "samples.png"
NEW_CARD = (
    "# {name}\n\n_Describe the intended use, the limitations and the licence of this model._"
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
    """Write a small copy of a finished run and evaluate the packed weights.

    Text above the generated part of an existing model card is kept.

    Args:
        run: Folder of the run.
        target: Folder to write.
        folders: Folders of the command, for the cached data.
        progress: Called with stage, done, total and a note.
        int8: Store the decoder's matrices in 8 bits with one scale per row; other matrices have 16
            bits.
        settings: Default sampling settings of the packed model, as ``sampling.key=value``.

    Raises:
        ValueError: If the run has not finished, if it names no evaluators, or if a setting does
            not start with ``sampling.``.  Also if the target is an unpacked run or overlaps this
            run.
    """
    for setting in settings:
        if not setting.startswith("sampling."):
            raise ValueError(f"settings: expected sampling.key=value, got {setting}")
    source = RunDirectory(run)
    for path in (source.summary, source.environment):
        if not path.is_file():
            raise ValueError(f"{run}: expected a finished run, got no {path.name}")
    summary = source.read_summary()
    if summary["status"] != "finished":
        raise ValueError(f"{run}: expected a finished run, got status {summary['status']}")
    _require_packable_target(target, run)
    with _staged_folder(target) as staged:
        _pack(source, RunDirectory(staged), int8=int8, settings=settings)
        evaluate_again(staged, folders, progress)
        generate_samples(staged)
        card_path = target / MODEL_CARD
        new_card = NEW_CARD.format(name=summary["experiment"])
        text = card_path.read_text("utf-8") if card_path.is_file() else new_card
        write_text(staged / MODEL_CARD, fill(text, {"card": model_card(staged)}))


def _require_packable_target(target: Path, run: Path) -> None:
    """Raise ``ValueError`` if the target holds weights that were not packed."""
    require_disjoint_paths(target, run, "folder")
    if RunDirectory(target).config.exists() and not (target / MADE).exists():
        raise ValueError(
            f"folder: expected a new folder or one that `rudolph pack` wrote, got {target}, "
            f"a run without {MADE}. Give another path"
        )


@contextmanager
def _staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder whose files move to ``target`` once all are complete."""
    destination = Path(os.path.realpath(target))
    staged = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if (target / MADE).is_file():
            # An earlier call may have written samples that this one does not replace.
            (target / SAMPLES_FILE).unlink(missing_ok=True)
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            final_path = destination / path.relative_to(staged)
            final_path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final_path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _pack(run: RunDirectory, target: RunDirectory, *, int8: bool, settings: Sequence[str]) -> None:
    """Write the packed weights of a run, its configuration and its origin."""
    summary, environment = run.read_summary(), run.read_environment()
    pipeline, config = load_run(run.path)
    if not config.evaluation.evaluators:
        raise ValueError(f"{run.config}: expected evaluation.evaluators, got none")
    checkpoints = target.checkpoints
    checkpoints.mkdir(parents=True, exist_ok=True)
    decoder = pipeline.decoder.state_dict()
    save_tensors(pack_int8(decoder) if int8 else _to_half(decoder), checkpoints / RUN_FILES[0])
    save_tensors(_to_half(pipeline.vqgan.state_dict()), checkpoints / RUN_FILES[1])
    pipeline.tokenizer.save(checkpoints / RUN_FILES[2])
    write_text(target.config, run_yaml(read_run(run.config, settings)))
    copied = ("experiment", "run", "digest", "commit", "dirty", "seconds")
    made = {name: summary[name] for name in copied} | {"machine": environment["machine"]}
    made["bits"] = 8 if int8 else 16
    write_json(target.path / MADE, made)


def generate_samples(folder: Path) -> None:
    """Save images that the packed model generates for its fixed prompts, if it has any."""
    pipeline, config = load_run(folder)
    if config.evaluation.grid_prompts:
        generate_prompts(pipeline, config, folder / SAMPLES_FILE)


def model_card(folder: Path) -> str:
    """Return the generated part of a model card: facts, samples and scores."""
    made = read_mapping(folder / MADE, run=str, seconds=dict, machine=dict)
    card = read_card(folder / CARD).assign(run=made["run"])
    header = [table_row(["", ""]), table_row(["---", "---"])]
    facts = [table_row(pair) for pair in _facts(folder, made)]
    samples = (
        [f"![samples for fixed prompts]({SAMPLES_FILE})", ""]
        if (folder / SAMPLES_FILE).is_file()
        else []
    )
    return "\n".join([*header, *facts, "", *samples, *card_table(card, list(card["score"]))])


def _facts(folder: Path, made: dict[str, object]) -> list[tuple[str, str]]:
    pipeline, config = load_run(folder)
    seconds, machine = made["seconds"], made["machine"]
    assert isinstance(seconds, dict) and isinstance(machine, dict)
    layout, total = config.sequence_layout, sum(row.weight for row in config.data.mixture)
    side = layout.image_tokens_per_dim
    tasks = ", ".join(f"{row.name} {row.weight / total:.0%}" for row in config.data.mixture)
    machine_text = ", ".join(
        [f"{machine['cores']} cores ({machine['processor']})", *machine["gpus"]]
    )
    size = sum((RunDirectory(folder).checkpoints / name).stat().st_size for name in RUN_FILES)
    return [
        ("decoder", f"{_decoder_shape(config)}, {_millions(pipeline.decoder)}"),
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
        ("trained", f"{sum(seconds.values()) / 60:.0f} minutes on {machine_text}"),
        ("from", f"`{made['experiment']}` {made['run']}, commit `{str(made['commit'])[:10]}`"),
        ("weights", f"decoder {made['bits']} bits, VQ-GAN 16, {size / 1e6:.1f} MB"),
    ]


def _decoder_shape(config: RunConfig) -> str:
    return f"{config.decoder.num_layers} layers of {config.decoder.hidden_size}"


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters"


def _to_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return matrices in 16 bits; keep vectors, which are small and may hold large counts."""
    return {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in tensors.items()
    }
