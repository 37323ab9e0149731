"""The stages of a run: data, tokenizer, VQ-GAN, indices, decoder, evaluation, samples.

What a stage makes is named by the digest of all that decides it, so runs share tokenizers,
VQ-GANs and indices; a stage that was interrupted goes on from its last checkpoint.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from rudolph.config import RunConfig, digest_of, plain
from rudolph.data.index_cache import cached_array
from rudolph.data.manifests import Manifest
from rudolph.data.module import (
    ImageExamples,
    Split,
    TokenExamples,
    task_texts,
)
from rudolph.data.seeds import mixed_seed
from rudolph.evaluation.report_card import QUESTIONS, Score, Subject
from rudolph.execution import Execution, is_main_process, without_note
from rudolph.fitting import CURVES, fit
from rudolph.gallery import draw_masks, draw_samples
from rudolph.models.adapt import adapt
from rudolph.models.decoder import MaskedDecoder
from rudolph.models.vqgan import VQGAN
from rudolph.models.weights import save_weights, weights_digest, weights_made_of
from rudolph.results.journal import exclusive
from rudolph.results.tracking import tracking_uri
from rudolph.sampling.pipeline import Pipeline
from rudolph.sequence.tasks import TASKS, fill_texts
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.sources import find_tokenizer, open_decoder, open_vqgan
from rudolph.training.decoder import DecoderTraining
from rudolph.training.tuning import apply_tuning
from rudolph.training.vqgan import VQGANTraining

DAY = 24 * 3600


def run_stages(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """All stages of a run: its scores, and the digests of what they came from."""
    config = execution.config
    pl.seed_everything(config.seed, verbose=False)
    cache = execution.folders.cache
    with execution.stage("data") as advance:
        advance(0, 1, config.data.dataset)
        splits = {name: Split(config.data, name, cache) for name in ("train", "validation")}
        tokenizer = make_tokenizer(execution, splits["train"])
        note = f"{len(splits['train'])} pairs, {tokenizer.vocab_size} BPE ids"
        dataset = splits["train"].dataset
        if isinstance(dataset, Manifest):
            note += f", {dataset.report.rows - dataset.report.kept} bad rows skipped"
        advance(1, 1, note)
    execution.tracker.log_tags({f"data.{name}": split.digest for name, split in splits.items()})
    vqgan = make_vqgan(execution, splits)
    indices = {name: image_indices(execution, vqgan, split) for name, split in splits.items()}
    digests = {
        **{f"data.{name}": split.digest for name, split in splits.items()},
        "tokenizer": tokenizer.digest,
        "vqgan": weights_digest(vqgan),
    }
    decoder = make_decoder(execution, splits, indices, tokenizer, made_of=digest_of(digests))
    if not is_main_process():
        return [], {}
    pipeline = Pipeline(tokenizer, vqgan, decoder).to(execution.hardware.device)
    save_pipeline(execution, pipeline)
    scores = evaluate(execution, pipeline, splits)
    draw_samples(execution, pipeline, splits)
    digests |= {f"data.{name}": split.digest for name, split in splits.items()}
    return scores, digests | {"decoder": weights_digest(decoder)}


def make_tokenizer(execution: Execution, train: Split) -> Tokenizer:
    """The named tokenizer, or one trained on the captions of the training split."""
    config, cache = execution.config, execution.folders.cache
    size = config.tokenizer.vocab_size
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer(find_tokenizer(config.tokenizer.path, **places(execution)))
        if tokenizer.vocab_size > size:
            raise ValueError(
                f"tokenizer.vocab_size must be at least {tokenizer.vocab_size}, the ids of "
                f"{config.tokenizer.path}, got {size}"
            )
        return tokenizer
    path = cache / f"tokenizer-{digest_of([size, train.digest])[:16]}.model"
    if path.is_file():
        return Tokenizer(path)
    return Tokenizer.train(train.captions, vocab_size=size, path=path)


def places(execution: Execution) -> dict[str, Any]:
    """Where a source of weights is looked for."""
    folders = execution.folders
    return {"runs": folders.runs, "uri": tracking_uri(folders.checkout)}


def make_vqgan(execution: Execution, splits: dict[str, Split]) -> VQGAN:
    """The VQ-GAN of this configuration: named, from the cache, or trained now."""
    config = execution.config
    if config.vqgan.init is not None:
        return named_vqgan(execution, config.vqgan.init)
    decides = (config.vqgan, config.vqgan_losses, config.vqgan_optim, config.data.flip)
    data = [split.digest for split in splits.values()]
    folder = execution.folders.cache / f"vqgan-{digest_of(*decides, data, config.seed)[:16]}"
    weights = folder / "weights.safetensors"
    torch.manual_seed(mixed_seed(config.seed, "vqgan"))
    model = VQGAN(config.vqgan)
    folder.mkdir(parents=True, exist_ok=True)
    # The other processes of a multi-device run train with the one that holds the lock.
    lock = exclusive(folder / "training.lock", DAY) if is_main_process() else nullcontext()
    with lock:
        if not weights.is_file():
            train_vqgan(execution, model, splits, weights)
        else:
            replay_curves(execution, folder / CURVES)
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


def named_vqgan(execution: Execution, source: str) -> VQGAN:
    """The VQ-GAN of a source, used as it is; its settings must be those of the file."""
    model = open_vqgan(source, **places(execution))
    asked = plain(replace(execution.config.vqgan, init=None))
    held = plain(replace(model.config, init=None))
    # What only a training reads may differ.
    for name in asked.keys() - {"dropout", "quantizer"}:
        if asked[name] != held[name]:
            raise ValueError(
                f"vqgan.{name} must be {held[name]}, as in {source}, got {asked[name]}"
            )
    for name in ("kind", "num_codes", "embedding_dim"):
        if asked["quantizer"][name] != held["quantizer"][name]:
            raise ValueError(
                f"vqgan.quantizer.{name} must be {held['quantizer'][name]}, as in {source}, "
                f"got {asked['quantizer'][name]}"
            )
    return model.eval().requires_grad_(False)


def train_vqgan(
    execution: Execution, model: VQGAN, splits: dict[str, Split], weights: Path
) -> None:
    """Train on the pictures of the training split and leave ``weights``."""
    config = execution.config
    with execution.stage("vqgan") as advance:
        _, num_accumulated = execution.hardware.batches(config.vqgan_optim)
        module = VQGANTraining(
            model, config.vqgan_losses, config.vqgan_optim, num_accumulated=num_accumulated
        )
        train = ImageExamples(splits["train"], seed=config.seed, flip=config.data.flip)
        validation = ImageExamples(splits["validation"], seed=config.seed)
        fit(
            execution,
            module,
            config.vqgan_optim,
            examples=(train.batch, validation.whole, len(splits["validation"])),
            stage="vqgan",
            advance=advance,
            weights=weights,
            made_of=weights.parent.name,
        )


def replay_curves(execution: Execution, path: Path) -> None:
    """Record the curves of a stage that another run trained as this run's own."""
    for line in path.read_text().splitlines():
        step, values = json.loads(line)
        execution.tracker.log_metrics(values, step=step)


def image_indices(execution: Execution, vqgan: VQGAN, split: Split) -> np.ndarray[Any, Any]:
    """Image indices of every picture of a split, ``(N, I)``; computed once, then from disk."""

    device = execution.hardware.device

    def compute() -> np.ndarray[Any, Any]:
        vqgan.to(device)
        parts = []
        with execution.stage(f"indices of {split.name}") as advance:
            for first in range(0, len(split), 256):
                advance(first, len(split), "")
                pictures = split.pictures(range(first, min(first + 256, len(split))))
                indices = vqgan.encode_indices(pictures.to(device))
                parts.append(indices.to("cpu", torch.int32).numpy())
            advance(len(split), len(split), "")
        return np.concatenate(parts)

    parts = {"kind": "image_indices", "data": split.digest, "vqgan": weights_digest(vqgan)}
    return cached_array(execution.folders.cache, parts=parts, compute=compute)


def make_decoder(
    execution: Execution,
    splits: dict[str, Split],
    indices: dict[str, np.ndarray[Any, Any]],
    tokenizer: Tokenizer,
    *,
    made_of: str,
) -> MaskedDecoder:
    """The decoder of this run, trained on the indices and texts of the training split.

    ``made_of`` is the digest of all that it learns from: a run that was stopped after its training
    takes the weights that it left, if they were made of the same.
    """
    config = execution.config
    weights = execution.folder / "checkpoints" / "decoder.safetensors"
    torch.manual_seed(mixed_seed(config.seed, "decoder"))
    model = MaskedDecoder(config.decoder, config.sequence_layout, config.vocabulary)
    draw_masks(execution, model)
    if weights.is_file() and weights_made_of(weights) == made_of:
        model.load_state_dict(load_file(weights))
        return model.eval().requires_grad_(False)
    with execution.stage("texts") as advance:
        examples = {
            name: token_examples(config, split, indices[name], tokenizer)
            for name, split in splits.items()
        }
        num_cut = max(texts.num_cut for texts in examples["train"].texts.values())
        advance(1, 1, f"{num_cut} of {len(splits['train'])} captions are too long and cut")
    start_from(execution, model)
    apply_tuning(model, config.decoder_tuning)
    model.has_checkpointing = execution.hardware.activation_checkpointing
    model.has_block_masks = execution.hardware.block_masks
    model.has_compiled_layers = execution.hardware.compile
    train_decoder(execution, model, examples, weights, made_of=made_of)
    model.has_compiled_layers = False
    return model.eval().requires_grad_(False)


def start_from(execution: Execution, model: MaskedDecoder) -> None:
    """Give the decoder the weights that its configuration names, if any; what changed is said."""
    source = execution.config.decoder.init
    if source is None:
        return
    with execution.stage("init") as advance:
        notes = adapt(open_decoder(source, **places(execution)), model)
        advance(1, 1, "; ".join([source, *notes]))


def train_decoder(
    execution: Execution,
    model: MaskedDecoder,
    examples: dict[str, TokenExamples],
    weights: Path,
    *,
    made_of: str,
) -> None:
    """Train on the examples of the training split and leave ``weights``."""
    config = execution.config
    with execution.stage("decoder") as advance:
        validation = examples["validation"]
        num_validation = validation.num_pairs * len(validation.tasks)
        _, num_accumulated = execution.hardware.batches(config.decoder_optim)
        module = DecoderTraining(
            model, config.decoder_losses, config.decoder_optim, num_accumulated=num_accumulated
        )
        fit(
            execution,
            module,
            config.decoder_optim,
            examples=(examples["train"].batch, validation.whole, num_validation),
            stage="decoder",
            advance=advance,
            weights=weights,
            made_of=made_of,
        )


def token_examples(
    config: RunConfig, split: Split, indices: np.ndarray[Any, Any], tokenizer: Tokenizer
) -> TokenExamples:
    """Training examples of a split, with its texts encoded anew where BPE-dropout asks for it."""
    places: dict[str, Any] = {"layout": config.sequence_layout, "vocabulary": config.vocabulary}
    tasks = [task for task, weight in config.data.tasks.items() if weight > 0]
    texts = {task: task_texts(split, task, tokenizer=tokenizer, **places) for task in tasks}
    dropout = config.tokenizer.bpe_dropout

    def redraw(pair: int, task: str, generator: torch.Generator) -> Any:
        return fill_texts(
            TASKS[task],
            split.captions[pair],
            tokenizer=tokenizer,
            beside=split.questions[pair] if TASKS[task].has_question else "",
            dropout=dropout,
            generator=generator,
            **places,
        )

    return TokenExamples(
        indices,
        texts,
        config.data,
        num_codes=config.vocabulary.codebook_size,
        num_examples=config.decoder_optim.num_steps * config.decoder_optim.global_batch_size,
        seed=config.seed,
        redraw=redraw if dropout else None,
    )


def evaluate(execution: Execution, pipeline: Pipeline, splits: dict[str, Split]) -> list[Score]:
    """Every question on every split that the configuration names."""
    config = execution.config
    scores: list[Score] = []
    for name in config.evaluation.splits:
        if name not in splits:
            splits[name] = Split(config.data, name, execution.folders.cache)
        for question in config.evaluation.questions:
            with execution.stage(f"{question} on {name}") as advance:
                subject = Subject(
                    pipeline,
                    config.sampling.image,
                    config.sampling.text,
                    num_examples=min(config.evaluation.num_examples, len(splits[name])),
                    seed=config.seed,
                    on_token=partial(without_note, advance),
                )
                found = QUESTIONS[question](subject, splits[name])
                advance(1, 1, f"{found[0].value:.3g} [{found[0].low:.3g}, {found[0].high:.3g}]")
            scores += found
    return scores


def save_pipeline(execution: Execution, pipeline: Pipeline) -> None:
    """What sampling needs beside the decoder: a run's folder can be moved or shared alone."""
    checkpoints = execution.folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    save_weights(pipeline.vqgan, checkpoints / "vqgan.safetensors")
    pipeline.tokenizer.save(checkpoints / "bpe.model")
    for name in ("decoder.safetensors", "vqgan.safetensors", "bpe.model"):
        execution.tracker.log_artifact(checkpoints / name, "checkpoints")
