"""The decoder of a run: its examples, its training, and what of them is scored."""

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rudolph.config.run import RunConfig, digest_of
from rudolph.data.examples import MixtureExamples, TokenExamples, task_texts
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import MixtureEntry, Split, Splits
from rudolph.files.atomic import write_text
from rudolph.models.rudolph.adapt import adapt
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import save_weights, weights_digest
from rudolph.runs.execution import Execution, copy_to_run, is_main_process
from rudolph.runs.resolve import open_decoder
from rudolph.runs.samples import save_masks
from rudolph.runs.stages.shared import shared_weights
from rudolph.runs.stages.tokenizer import source_locations
from rudolph.runs.trainer import fit
from rudolph.sequence.layout import SEGMENTS
from rudolph.sequence.tasks import TASKS, Texts, fill_texts
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.decoder import DecoderTraining
from rudolph.training.tuning import apply_tuning

# Image indices (N, I) of the images of a split, by split and dataset.
Indices = dict[tuple[str, str], np.ndarray[Any, Any]]
SCORED_TABLE = "scored.csv"


def make_decoder(
    execution: Execution,
    splits: Splits,
    indices: Indices,
    tokenizer: Tokenizer,
    vqgan: VQGAN,
    *,
    made_of: str,
) -> MaskedDecoder:
    """The decoder of this run: from the cache, or trained now on the training splits.

    Of no training at all it is the one that the configuration names.  It lies in the run's folder.

    Args:
        made_of: the digest of data, tokenizer and VQ-GAN.
    """
    config = execution.config
    path = execution.folder / "checkpoints" / "decoder.safetensors"
    path.parent.mkdir(exist_ok=True)
    model = new_decoder(config, vqgan)
    save_masks(execution, model)
    start = start_from(execution, model)
    if config.decoder_optim.num_steps == 0:
        if is_main_process():
            save_weights(model, path)
        return model.eval().requires_grad_(False)

    def train(weights: Path) -> None:
        examples = examples_of(execution, splits, indices, tokenizer)
        apply_tuning(model, config.decoder_tuning)
        model.has_checkpointing = execution.hardware.activation_checkpointing
        model.has_block_masks = execution.hardware.block_masks
        model.has_compiled_layers = execution.hardware.compile
        train_decoder(execution, model, examples, weights)
        model.has_compiled_layers = False

    name = f"decoder-{digest_of(*decoder_digest_parts(config), made_of, start)[:16]}"
    weights = shared_weights(execution, name, model, train)
    if is_main_process():
        copy_to_run(weights, path)
    return model.eval().requires_grad_(False)


def new_decoder(config: RunConfig, vqgan: VQGAN) -> MaskedDecoder:
    """Return the decoder of a run before any training, as the run's seed initialises it."""
    torch.manual_seed(mixed_seed(config.seed, "decoder"))
    model = MaskedDecoder(config.decoder, config.sequence_layout, config.vocabulary)
    if config.decoder.paired_start:
        model.init_by_name(partial(mixed_seed, config.seed, "decoder"))
    if config.decoder.image_start == "codebook":
        every = torch.arange(config.vqgan.quantizer.num_codes)
        model.init_from_codebook(vqgan.quantize.codes(every[:, None, None])[:, :, 0, 0])
    return model


def decoder_digest_parts(config: RunConfig) -> tuple[Any, ...]:
    """Of a configuration what the weights of its decoder come from."""
    parts = (config.data, config.tokenizer, config.layout, config.seed)
    optim = (config.decoder_losses, config.decoder_optim, config.decoder_tuning)
    return (*parts, config.decoder, *optim)


def examples_of(
    execution: Execution, splits: Splits, indices: Indices, tokenizer: Tokenizer
) -> dict[str, TokenExamples]:
    """Examples of both splits of a training; what of them is cut and scored is said."""
    config = execution.config
    with execution.stage("texts") as advance:
        examples = {
            name: token_examples(config, splits, name, indices, tokenizer)
            for name in ("train", "validation")
        }
        num_cut = max(each.texts.num_cut for each in examples["train"].sources)
        num_texts = sum(len(split) for split in splits.all("train"))
        advance(1, 1, f"{num_cut} of {num_texts} texts are too long and cut")
    print_scored_fraction(execution, examples["train"])
    return examples


def start_from(execution: Execution, model: MaskedDecoder) -> str:
    """Give the decoder the weights that its configuration names; what changed is said.

    Returns their digest, empty where none are named.
    """
    source = execution.config.decoder.init
    if source is None:
        return ""
    with execution.stage("init") as advance:
        start = open_decoder(source, **source_locations(execution))
        notes = adapt(start, model)
        advance(1, 1, "; ".join([source, *notes]))
    return weights_digest(start)


def train_decoder(
    execution: Execution,
    model: MaskedDecoder,
    examples: dict[str, TokenExamples],
    weights: Path,
) -> None:
    """Train on the examples of the training splits and leave ``weights``."""
    config = execution.config
    with execution.stage("decoder") as advance:
        _, num_accumulated = execution.hardware.batches(config.decoder_optim)
        module = DecoderTraining(
            model,
            config.decoder_losses,
            config.decoder_optim,
            num_accumulated=num_accumulated,
            sources=[each.source.name for each in examples["train"].sources],
        )
        validation = examples["validation"]
        fit(
            execution,
            module,
            config.decoder_optim,
            examples=(examples["train"].batch, validation.whole, validation.num_whole),
            stage="decoder",
            advance=advance,
            weights=weights,
            made_of=weights.parent.name,
            seed=config.seed,
        )


def token_examples(
    config: RunConfig, splits: Splits, name: str, indices: Indices, tokenizer: Tokenizer
) -> TokenExamples:
    """Examples of the mixture from one split of each of its datasets."""
    sources = [
        filled_source(
            config,
            source,
            splits(name, source.dataset),
            tokenizer,
            indices.get((name, source.dataset)),
        )
        for source in config.data.mixture
    ]
    return TokenExamples(
        sources,
        config.data,
        layout=config.sequence_layout,
        vocabulary=config.vocabulary,
        num_examples=config.decoder_optim.num_steps * config.decoder_optim.global_batch_size,
        seed=config.seed,
        task_weights=config.decoder_losses.task_weights,
    )


def filled_source(
    config: RunConfig,
    source: MixtureEntry,
    split: Split,
    tokenizer: Tokenizer,
    indices: np.ndarray[Any, Any] | None,
) -> MixtureExamples:
    """A row of the mixture, with texts encoded anew where BPE-dropout asks for it."""
    source_locations: dict[str, Any] = {
        "layout": config.sequence_layout,
        "vocabulary": config.vocabulary,
    }
    task, dropout = TASKS[source.task], config.tokenizer.bpe_dropout

    def redraw(pair: int, generator: torch.Generator) -> Texts:
        return fill_texts(
            task,
            split.captions[pair],
            tokenizer=tokenizer,
            beside=split.questions[pair] if task.has_question else "",
            dropout=dropout,
            generator=generator,
            **source_locations,
        )

    texts = task_texts(split, source.task, tokenizer=tokenizer, **source_locations)
    return MixtureExamples(source, texts, indices, redraw if dropout else None)


def print_scored_fraction(execution: Execution, examples: TokenExamples) -> None:
    """What is scored of each row of the mixture, with which weights: said, and kept as a table."""
    if len(examples.sources) == 1 or not is_main_process():
        return
    total = sum(each.source.weight for each in examples.sources)
    rows = []
    for each, weights in zip(examples.sources, examples.weights.tolist(), strict=True):
        share = each.source.weight / total
        scored = dict(zip(SEGMENTS, weights, strict=True))
        named = ", ".join(f"{name} {weight:g}" for name, weight in scored.items() if weight)
        with execution.stage(f"scores {each.source.name}") as advance:
            advance(1, 1, f"{share:.1%} of examples; {named}")
        rows.append({"source": each.source.name, "share": share, **scored})
    path = execution.folder / SCORED_TABLE
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    execution.tracker.log_artifact(path)
