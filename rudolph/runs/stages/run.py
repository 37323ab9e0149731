"""The stages of a run: data, tokenizer, VQ-GAN, indices, decoder, evaluation, samples.

What a stage makes is named by the digest of all that decides it, so runs share tokenizers,
VQ-GANs and indices; a stage that was interrupted goes on from its last checkpoint.
"""

import pytorch_lightning as pl

from rudolph.config.run import digest_of
from rudolph.data.splits import Splits
from rudolph.evaluation.context import Score
from rudolph.generation.pipeline import Pipeline
from rudolph.models.weights import save_weights, weights_digest
from rudolph.runs.execution import Execution, is_main_process
from rudolph.runs.samples import save_samples, warn_of_unknown
from rudolph.runs.stages.decoder import make_decoder
from rudolph.runs.stages.evaluation import evaluate
from rudolph.runs.stages.image_tokenizer import image_indices, make_vqgan
from rudolph.runs.stages.origins import warn_of_other_parts
from rudolph.runs.stages.tokenizer import open_data


def run_stages(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """All stages of a run: its scores, and the digests of what they came from."""
    config = execution.config
    pl.seed_everything(config.seed, verbose=False)
    splits = Splits(config.data, execution.folders.cache)
    tokenizer = open_data(execution, splits)
    if is_main_process():
        warn_of_unknown(config, tokenizer)
    execution.tracker.log_tags(splits.digests)
    vqgan = make_vqgan(execution, splits)
    if is_main_process():
        warn_of_other_parts(execution, tokenizer, vqgan)
    names = ("train", "validation") if config.decoder_optim.num_steps else ()
    indices = {
        (split.name, split.dataset_name): image_indices(execution, vqgan, split)
        for name in names
        for split in splits.with_images(name)
    }
    digests = {**splits.digests, "tokenizer": tokenizer.digest, "vqgan": weights_digest(vqgan)}
    made_of = digest_of(digests)
    decoder = make_decoder(execution, splits, indices, tokenizer, vqgan, made_of=made_of)
    if not is_main_process():
        return [], {}
    pipeline = Pipeline(tokenizer, vqgan, decoder).to(execution.hardware.device)
    save_pipeline(execution, pipeline)
    scores = evaluate(execution, pipeline, splits)
    save_samples(execution, pipeline, splits, made_of=made_of)
    return scores, digests | splits.digests | {"decoder": weights_digest(decoder)}


def save_pipeline(execution: Execution, pipeline: Pipeline) -> None:
    """What sampling needs beside the decoder: a run's folder can be moved or shared alone."""
    checkpoints = execution.folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    save_weights(pipeline.vqgan, checkpoints / "vqgan.safetensors")
    pipeline.tokenizer.save(checkpoints / "bpe.model")
    for name in ("decoder.safetensors", "vqgan.safetensors", "bpe.model"):
        execution.tracker.log_artifact(checkpoints / name, "checkpoints")
