"""The stages of a run: data, tokenizer, VQ-GAN, image indices, model, evaluation, samples.

Every cached file is named by the digest of everything that determines it, so runs share
tokenizers, VQ-GANs and indices.  An interrupted stage resumes from its last checkpoint.
"""

from functools import partial

import pytorch_lightning as pl
from torch import nn

from rudolph.config.run import digest_of
from rudolph.data.splits import Splits
from rudolph.evaluation.context import Score
from rudolph.families.interface import Parts
from rudolph.families.registry import family_of
from rudolph.families.sharded import ShardedCapabilities, errors_everywhere, num_processes
from rudolph.models.weights import weights_digest
from rudolph.runs.execution import Execution
from rudolph.runs.resolve import OF_EXPERIMENT, find_folder, open_weights
from rudolph.runs.samples import save_samples, warn_of_unknown
from rudolph.runs.stages.evaluation import evaluate
from rudolph.runs.stages.image_tokenizer import image_indices, make_vqgan
from rudolph.runs.stages.model import make_model
from rudolph.runs.stages.origins import warn_of_other_parts
from rudolph.runs.stages.tokenizer import open_data, source_locations


def run_stages(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Run all stages; return the scores and the digests of data, parts and model.

    Processes that trained together share the evaluation.  All but the main process return nothing.
    """
    config = execution.config
    family = family_of(config.model)
    pl.seed_everything(config.seed, verbose=False)
    require_named_runs(execution)
    splits = Splits(config.data, execution.folders.cache)
    parts = make_parts(execution, splits)
    digests = dict(splits.digests)
    if parts.tokenizer is not None:
        digests["tokenizer"] = parts.tokenizer.digest
    if parts.vqgan is not None:
        digests["vqgan"] = weights_digest(parts.vqgan)
    digests |= {name: weights_digest(part) for name, part in parts.models.items()}
    digest = digest_of(digests)
    model = make_model(execution, splits, parts, digest=digest)
    shares_evaluation = num_processes() > 1
    if not (execution.is_main_process or shares_evaluation):
        return [], {}
    model.to(execution.hardware.device)
    capabilities = family.open(config, model, parts)
    with errors_everywhere():
        if execution.is_main_process:
            save_model(execution, model, parts)
    scores = evaluate(
        execution, ShardedCapabilities(capabilities) if shares_evaluation else capabilities, splits
    )
    if not execution.is_main_process:
        return [], {}
    save_samples(execution, capabilities, splits, digest=digest)
    return scores, digests | splits.digests | {family.stage: weights_digest(model)}


def make_parts(execution: Execution, splits: Splits) -> Parts:
    """Train or load the parts that the run's family needs, the tokenizer first."""
    config = execution.config
    needs = family_of(config.model).needs(config.model)
    tokenizer = open_data(execution, splits, has_tokenizer="tokenizer" in needs)
    if tokenizer is not None and execution.is_main_process:
        warn_of_unknown(config, tokenizer)
    execution.tracker.log_tags(splits.digests)
    if "vqgan" not in needs:
        return Parts(tokenizer, models=trained_parts(execution))
    vqgan = make_vqgan(execution, splits).to(execution.hardware.device)
    if tokenizer is not None and execution.is_main_process:
        warn_of_other_parts(execution, tokenizer, vqgan)
    models = trained_parts(execution)
    if "image_indices" not in needs:
        return Parts(tokenizer, vqgan, models=models)
    indices = partial(image_indices, execution, vqgan)
    if config.optim.num_steps:
        for name in ("train", "validation"):
            for split in splits.with_images(name):
                indices(split)
    return Parts(tokenizer, vqgan, indices, models)


def require_named_runs(execution: Execution) -> None:
    """Check that the runs of all sources ``experiment:NAME`` exist, before any data is read.

    Raises:
        ValueError: If such a run does not exist; the message says how to train it.
    """
    config = execution.config
    parts = [source for source, _ in config.model.part_sources.values()]
    own = config.model.init, config.tokenizer.path, config.evaluation.clip
    vqgan = config.vqgan.init if config.needs_vqgan else None
    for source in (*parts, *own, vqgan):
        if source is not None and source.startswith(OF_EXPERIMENT):
            find_folder(source, **source_locations(execution))


def trained_parts(execution: Execution) -> dict[str, nn.Module]:
    """Return the pretrained parts that the model starts from, keyed by name."""
    sources, locations = execution.config.model.part_sources, source_locations(execution)
    if not sources:
        return {}
    with execution.stage("parts") as advance:
        parts = {
            name: open_weights(source, kind, **locations)
            for name, (source, kind) in sources.items()
        }
        advance(1, 1, ", ".join(source for source, _ in sources.values()))
    return parts


def save_model(execution: Execution, model: nn.Module, parts: Parts) -> None:
    """Write the model and its parts into the run's folder, so that it can be moved alone."""
    checkpoints = execution.directory.checkpoints
    checkpoints.mkdir(exist_ok=True)
    origin = {"run": execution.run.name, "digest": execution.config.digest}
    family = family_of(execution.config.model)
    for path in family.save(checkpoints, model, parts, origin=origin):
        folder = path.parent.relative_to(execution.folder).as_posix()
        execution.tracker.log_artifact(path, folder)
