"""The model of a run: built, initialised, and trained or loaded from the cache."""

import csv
import io
from pathlib import Path
from typing import Any

from torch import nn

from rudolph.config.run import digest_of
from rudolph.data.examples import TokenExamples
from rudolph.data.splits import Splits
from rudolph.families.interface import Family, Parts
from rudolph.families.registry import family_of
from rudolph.files.atomic import write_text
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.weights import save_weights, weights_digest
from rudolph.runs.execution import Execution, copy_to_run
from rudolph.runs.resolve import open_weights
from rudolph.runs.samples import save_masks
from rudolph.runs.stages.shared import shared_weights
from rudolph.runs.stages.tokenizer import source_locations
from rudolph.runs.trainer import fit
from rudolph.sequence.layout import SEGMENTS

SCORED_TABLE = "scored.csv"


def make_model(execution: Execution, splits: Splits, parts: Parts, *, digest: str) -> nn.Module:
    """Return the model of a run in evaluation mode, from the cache or trained now.

    Without training steps, ``model.init`` provides the model.  The weights are written to the
    run's folder if the family has a file for them.

    Args:
        execution: The run.
        splits: Splits of the run's datasets.
        parts: Tokenizer and VQ-GAN of the run.
        digest: Digest of the data and the parts.
    """
    config = execution.config
    family = family_of(config.model)
    model = family.build(config, parts)
    if not family.is_trained:
        return model
    save_masks(execution, model)
    start = start_from(execution, family, model)
    if config.optim.num_steps == 0:
        weights = None
    else:
        decides = (config.data, config.tokenizer, config.layout, config.seed)
        name = digest_of(*decides, config.model, config.optim, digest, start)[:16]

        def train(weights: Path) -> None:
            train_model(execution, family, model, splits, parts, weights)

        weights = shared_weights(execution, f"{family.stage}-{name}", model, train)
    if family.weights_file is not None and execution.is_main_process:
        path = execution.directory.checkpoints / family.weights_file
        path.parent.mkdir(exist_ok=True)
        if weights is None:
            save_weights(model, path)
        else:
            copy_to_run(weights, path)
    return model.eval().requires_grad_(False)


def start_from(execution: Execution, family: Family, model: nn.Module) -> str:
    """Load the weights of ``model.init`` into a model and report resized tensors.

    Returns:
        The digest of those weights, or "" without ``model.init``.
    """
    source = execution.config.model.init
    if source is None:
        return ""
    with execution.stage("init") as advance:
        start = open_weights(source, type(model), **source_locations(execution))
        notes = family.adapt(start, model)
        advance(1, 1, "; ".join([source, *notes]))
    return weights_digest(start)


def train_model(
    execution: Execution,
    family: Family,
    model: nn.Module,
    splits: Splits,
    parts: Parts,
    weights: Path,
) -> None:
    """Train a model on the training splits and write ``weights``."""
    config = execution.config
    with execution.stage("texts") as advance:
        train, validation = (
            family.examples(config, splits, name, parts) for name in ("train", "validation")
        )
        advance(1, 1, train.note())
    if isinstance(train, TokenExamples):
        print_scored_fraction(execution, train)
    with execution.stage(family.stage) as advance:
        fit(
            execution,
            family.training(config, model, train, execution.hardware.training_flags(config.optim)),
            config.optim,
            examples=(train.batch, validation.whole, validation.num_whole),
            stage=family.stage,
            advance=advance,
            weights=weights,
            digest=weights.parent.name,
            seed=config.seed,
        )
    if isinstance(model, MaskedDecoder):
        # Evaluation uses many other shapes, and each of them would need another compilation.
        model.has_compiled_layers = False


def print_scored_fraction(execution: Execution, examples: TokenExamples) -> None:
    """Print the fraction and the loss weights of each mixture entry and write them as CSV."""
    if len(examples.entries) == 1 or not execution.is_main_process:
        return
    total_weight = sum(entry.source.weight for entry in examples.entries)
    rows: list[dict[str, Any]] = []
    for entry, weights in zip(examples.entries, examples.weights.tolist(), strict=True):
        fraction = entry.source.weight / total_weight
        scored = dict(zip(SEGMENTS, weights, strict=True))
        weights_text = ", ".join(f"{name} {weight:g}" for name, weight in scored.items() if weight)
        with execution.stage(f"scores {entry.source.name}") as advance:
            advance(1, 1, f"{fraction:.1%} of examples; {weights_text}")
        rows.append({"source": entry.source.name, "share": fraction, **scored})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path = execution.folder / SCORED_TABLE
    write_text(path, buffer.getvalue())
    execution.tracker.log_artifact(path)
