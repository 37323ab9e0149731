"""A CLIP of a run: trained on captions and images, asked to find each by the other."""

from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

from rudolph.checkpoints import store
from rudolph.config.run import digest_of
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Splits
from rudolph.data.text_image import TextImageExamples
from rudolph.evaluation.context import Score
from rudolph.evaluation.evaluators.retrieval import retrieval
from rudolph.generation.clip_ranking import PLAIN_TEMPLATES, ClipRanker
from rudolph.models.reference import to_reference
from rudolph.models.vision.clip import CLIP
from rudolph.models.weights import weights_digest
from rudolph.runs.execution import Execution, is_main_process
from rudolph.runs.resolve import CLIP_FOLDER
from rudolph.runs.stages.evaluation import save_card
from rudolph.runs.stages.shared import shared_weights
from rudolph.runs.stages.tokenizer import open_data
from rudolph.runs.trainer import fit
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.clip import CLIPTraining


def run_clip_stages(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """All stages of a run that trains a CLIP: its scores, and the digests of their sources."""
    config = execution.config
    pl.seed_everything(config.seed, verbose=False)
    splits = Splits(config.data, execution.folders.cache)
    tokenizer = open_data(execution, splits)
    digests = {**splits.digests, "tokenizer": tokenizer.digest}
    execution.tracker.log_tags(splits.digests)
    model = make_clip(execution, splits, tokenizer, made_of=digest_of(digests))
    if not is_main_process():
        return [], {}
    save_clip(execution, model, tokenizer)
    model.to(execution.hardware.device)
    ranker = ClipRanker(model, tokenizer, templates=PLAIN_TEMPLATES, batch_size=256)
    scores = []
    for name in config.evaluation.splits:
        with execution.stage(f"retrieval on {name}") as advance:
            number = config.evaluation.num_examples
            found = retrieval(ranker, splits(name), num_examples=number, seed=config.seed)
            advance(1, 1, ", ".join(f"{each.metric} {each.value:.3g}" for each in found))
        scores += found
    save_card(execution, scores)
    return scores, digests | splits.digests | {"clip": weights_digest(model)}


def make_clip(execution: Execution, splits: Splits, tokenizer: Tokenizer, *, made_of: str) -> CLIP:
    """The CLIP of this run: from the cache, or trained now on the main dataset.

    Args:
        made_of: the digest of data and tokenizer.
    """
    config = execution.config
    decides = (config.clip, config.clip_losses, config.clip_optim, config.seed)
    torch.manual_seed(mixed_seed(config.seed, "clip"))
    model = CLIP(config.clip)
    shared_weights(
        execution,
        f"clip-{digest_of(*decides, made_of)[:16]}",
        model,
        partial(train_clip, execution, model, splits, tokenizer),
    )
    return model.eval().requires_grad_(False)


def train_clip(
    execution: Execution, model: CLIP, splits: Splits, tokenizer: Tokenizer, weights: Path
) -> None:
    """Train on the training split of the main dataset and leave ``weights``."""
    config = execution.config
    with execution.stage("texts") as advance:
        train, validation = (
            TextImageExamples(splits(name), tokenizer, config.clip, seed=config.seed)
            for name in ("train", "validation")
        )
        advance(1, 1, f"{train.num_cut} of {train.num_pairs} captions are too long and cut")
    with execution.stage("clip") as advance:
        _, num_accumulated = execution.hardware.batches(config.clip_optim)
        module = CLIPTraining(
            model, config.clip_losses, config.clip_optim, num_accumulated=num_accumulated
        )
        fit(
            execution,
            module,
            config.clip_optim,
            examples=(train.batch, validation.whole, validation.num_pairs),
            stage="clip",
            advance=advance,
            weights=weights,
            made_of=weights.parent.name,
            seed=config.seed,
        )


def save_clip(execution: Execution, model: CLIP, tokenizer: Tokenizer) -> Path:
    """The CLIP as a released one lies on a disk: every verb that takes a CLIP takes the run."""
    folder = execution.folder.joinpath(*CLIP_FOLDER)
    family, config, tensors = to_reference(model)
    origin = {"run": execution.run.name, "digest": execution.config.digest}
    store.write_checkpoint(folder, tensors, family=family, config=config, origin=origin)
    tokenizer.save(folder / store.TOKENIZER_FILE)
    for path in sorted(folder.iterdir()):
        execution.tracker.log_artifact(path, "/".join(CLIP_FOLDER))
    return folder
