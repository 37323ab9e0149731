"""The VQ-GAN of a run, loaded, cached or trained, and its image indices."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudolph.config.run import digest_of, to_plain
from rudolph.data.cache import ArrayWriter, cached_array
from rudolph.data.examples import ImageExamples
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import SplitArrays, Splits
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import weights_digest
from rudolph.runs.execution import Execution
from rudolph.runs.resolve import open_vqgan
from rudolph.runs.stages.shared import shared_weights
from rudolph.runs.stages.tokenizer import source_locations
from rudolph.runs.trainer import fit
from rudolph.training.vqgan import VQGANTraining


def make_vqgan(execution: Execution, splits: Splits) -> VQGAN:
    """Return the VQ-GAN of a run: from ``vqgan.init``, from the cache, or trained now.

    Raises:
        ValueError: If no dataset has images, or if ``vqgan.init`` has other settings.
    """
    config = execution.config
    if config.vqgan.init is not None:
        return named_vqgan(execution, config.vqgan.init)
    names = ("train", "validation")
    images = {name: splits.with_images(name) for name in names}
    if not images["train"]:
        raise ValueError("data.tasks: expected a dataset with images, got none")
    data = [split.digest for name in names for split in images[name]]
    decides = (config.vqgan, config.vqgan_losses, config.vqgan_optim, config.data.flip_probability)
    torch.manual_seed(mixed_seed(config.seed_of_vqgan, "vqgan"))
    model = VQGAN(config.vqgan)
    shared_weights(
        execution,
        f"vqgan-{digest_of(*decides, data, config.seed_of_vqgan)[:16]}",
        model,
        partial(train_vqgan, execution, model, images),
    )
    return model.eval().requires_grad_(False)


def named_vqgan(execution: Execution, source: str) -> VQGAN:
    """Load the VQ-GAN of a source without training it further.

    Raises:
        ValueError: If its settings differ from the ``vqgan`` section.
    """
    model = open_vqgan(source, **source_locations(execution))
    requested = to_plain(replace(execution.config.vqgan, init=None))
    loaded = to_plain(replace(model.config, init=None))
    # Settings that only training reads may differ.
    for name in requested.keys() - {"dropout", "quantizer"}:
        if requested[name] != loaded[name]:
            raise ValueError(
                f"vqgan.{name}: expected {loaded[name]} as in {source}, got {requested[name]}"
            )
    for name in ("kind", "num_codes", "embedding_dim"):
        if requested["quantizer"][name] != loaded["quantizer"][name]:
            raise ValueError(
                f"vqgan.quantizer.{name}: expected {loaded['quantizer'][name]} as in {source}, "
                f"got {requested['quantizer'][name]}"
            )
    return model.eval().requires_grad_(False)


def train_vqgan(
    execution: Execution, model: VQGAN, splits: dict[str, list[SplitArrays]], weights: Path
) -> None:
    """Train a VQ-GAN on the images of the training splits and write ``weights``."""
    config = execution.config
    with execution.stage("vqgan") as advance:
        module = VQGANTraining(model, config.vqgan_losses, config.vqgan_optim)
        train = ImageExamples(
            *splits["train"],
            seed=config.seed_of_vqgan,
            flip_probability=config.data.flip_probability,
        )
        validation = ImageExamples(*splits["validation"], seed=config.seed_of_vqgan)
        fit(
            execution,
            module,
            config.vqgan_optim,
            examples=(train.batch, validation.whole, validation.num_whole),
            stage="vqgan",
            advance=advance,
            weights=weights,
            digest=weights.parent.name,
            seed=config.seed_of_vqgan,
        )


def image_indices(execution: Execution, vqgan: VQGAN, split: SplitArrays) -> np.ndarray[Any, Any]:
    """Return the image indices ``(N, I)`` of all images of a split, cached on disk.

    With ``data.num_code_samples`` S, the training split has S sampled encodings: ``(N, S, I)``.
    """
    device, config = execution.hardware.device, execution.config
    num_samples = config.data.num_code_samples if split.name == "train" else 0
    generator = torch.Generator(device)

    def encode(images: Tensor, first: int) -> Tensor:
        if not num_samples:
            return vqgan.encode_indices(images)
        generator.manual_seed(mixed_seed(config.seed, "codes", first))
        samples = [vqgan.encode_indices(images, generator=generator) for _ in range(num_samples)]
        return torch.stack(samples, dim=1)

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        vqgan.to(device)
        with execution.stage(f"indices of {split.dataset_name} {split.name}") as advance:
            number = split.num_images
            for first in range(0, number, 256):
                advance(first, number, "")
                images = split.image_batch(range(first, min(first + 256, number)))
                yield encode(images.to(device), first).to("cpu", torch.int32).numpy()
            advance(number, number, "")

    def compute() -> ArrayWriter:
        own = batches()
        start = next(own)
        rows = chain(start, chain.from_iterable(own))
        return ArrayWriter((split.num_images, *start.shape[1:]), start.dtype, rows)

    parts = {"kind": "image_indices", "data": split.digest, "vqgan": weights_digest(vqgan)}
    if num_samples:
        parts["draws"] = f"{num_samples} by {config.seed}"
    return cached_array(execution.folders.cache, parts=parts, compute=compute)
