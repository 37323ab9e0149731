"""Training of CLIP: contrastive matching of images and captions within a batch.

Every pair of a batch is compared with every other, on all devices, so a batch is never split into
micro-batches.  If several pairs share a caption, it fits the images of all these pairs.  The
softmax loss leaves the extra matches out of its sums.  The sigmoid loss scores every image with
every caption separately and counts the extra matches as matches.

Source: Radford 2021 (arXiv:2103.00020), with open_clip for the bounds of the scale; SigLIP (Zhai
2023, arXiv:2303.15343) and LiT (Zhai 2021, arXiv:2111.07991).

Shapes: B pairs per batch, N pairs in all, E embedding dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.data.text_image import TextImageBatch
from rudolph.generation.clip_ranking import retrieval_recalls
from rudolph.models.layers.native_types import sum_dtype
from rudolph.models.vision.clip import CLIP
from rudolph.training.clip_losses import (
    CLIP_LOSSES,
    MAX_LOGIT_SCALE,
    CLIPLossConfig,
    require_bias,
)
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule


def prepare_for(model: CLIP, losses: CLIPLossConfig) -> None:
    """Set a CLIP's initial scale and bias for a loss, and freeze the tower that the loss names.

    Raises:
        ValueError: if the model has a bias that the loss does not train, or lacks one it needs.
    """
    require_bias(losses, has_bias=model.config.has_logit_bias)
    with torch.no_grad():
        if losses.initial_scale is not None:
            model.logit_scale.fill_(math.log(losses.initial_scale))
        if losses.initial_bias is not None and model.logit_bias is not None:
            model.logit_bias.fill_(losses.initial_bias)
    for name, parameter in model.named_parameters():
        tower = "image" if name.startswith("visual.") else "text"
        if tower == losses.frozen and not name.startswith("logit_"):
            parameter.requires_grad_(False)


class CLIPTraining(ManualStepModule):
    """The training of a ``CLIP`` on ``TextImageBatch``; validates by loss and retrieval.

    It logs ``val/loss`` over groups of ``global_batch_size`` pairs, as in training, and the
    ``retrieval_recalls`` among all validation pairs.

    Raises:
        ValueError: if the model does not fit the loss, or a device's part of a batch is split
            into micro-batches.
    """

    def __init__(self, model: CLIP, losses: CLIPLossConfig, optim: OptimConfig) -> None:
        super().__init__(optim)
        prepare_for(model, losses)
        self.model, self.losses = model, losses
        self.validated: list[tuple[Tensor, ...]] = []

    def networks(self) -> list[nn.Module]:
        """Return the CLIP."""
        return [self.model]

    def accumulate(self, batch: TextImageBatch, step: int, totals: Tensor) -> Tensor:
        """Add the gradients of a device's part of the loss; return that part ``(1,)``."""
        num_devices = self.trainer.world_size
        if len(batch.examples) * num_devices != float(totals):
            raise ValueError(
                "global_batch_size: expected one micro-batch on each device, because all pairs "
                f"are compared, got {len(batch.examples)} of {float(totals):.0f} pairs"
            )
        images, texts = (self.gather_rows(each) for each in self.features(batch))
        numbers = (self.gather_rows(each) for each in (batch.image_ids, batch.captions))
        # Every device computes the whole loss.
        share = self.loss(images, texts, *numbers) / num_devices
        self.add_gradients(share)
        return share.detach().to(sum_dtype(self.device)).view(1)

    def step_losses(self, sums: Tensor, step: int, totals: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        return {"loss": sums[0]}

    def finish_step(self, step: int, totals: Tensor) -> None:
        """Bound the logit scale and log it."""
        if self.losses.kind == "softmax":
            self.model.logit_scale.data.clamp_(0, math.log(MAX_LOGIT_SCALE))
        self.log("train/logit_scale", self.model.logit_scale.exp())

    def features(self, batch: TextImageBatch) -> tuple[Tensor, Tensor]:
        """Return normalised float32 features ``(B, E)`` of the images and of the captions."""
        images = self.model.encode_image(batch.pixel_values)
        texts = self.model.encode_text(batch.input_ids)
        return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all devices; gradients flow only to this device's own rows."""
        world = self.trainer.world_size
        if world == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(world)]
        # Lightning's own gathering uses a function that torch has deprecated.
        torch.distributed.all_gather(gathered, rows.detach())
        gathered[self.global_rank] = rows
        if rows.requires_grad:
            # Gradients are averaged over devices, but only this device's loss reaches these rows.
            rows.register_hook(lambda gradient: gradient * world)  # type: ignore[no-untyped-call]
        return torch.cat(gathered)

    def loss(
        self, images: Tensor, texts: Tensor, image_numbers: Tensor, captions: Tensor
    ) -> Tensor:
        """Compute the scalar loss of a batch of pairs.

        Args:
            images: ``(B, E)``, normalised image features.
            texts: ``(B, E)``, normalised caption features.
            image_numbers: ``(B,)``, equal where images are equal.
            captions: ``(B,)``, equal where captions are equal texts.
        """
        # bfloat16 autocast would round logits near 100 to multiples of 0.5.
        with torch.autocast(images.device.type, enabled=False):
            logits = self.model.logits(images, texts)
        is_match = (captions[:, None] == captions) | (image_numbers[:, None] == image_numbers)
        return CLIP_LOSSES[self.losses.kind](logits, is_match)

    def on_validation_epoch_start(self) -> None:
        """Discard the features of the last validation."""
        self.validated = []

    def validation_step(self, batch: TextImageBatch, batch_index: int) -> None:
        """Store the features of a validation batch."""
        numbers = batch.image_ids, batch.captions
        self.validated.append((batch.examples, *numbers, *self.features(batch)))

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the retrieval recalls of all validation pairs."""
        numbers, captions, images, texts = self.gather_validation()
        size = self.optim.global_batch_size
        starts = range(0, max(len(captions) - size, 0) + 1, size)
        groups = [slice(first, first + size) for first in starts]
        pairs = (images, texts, numbers, captions)
        losses = [self.loss(*(rows[group] for rows in pairs)) for group in groups]
        # The values are equal on every device; ``sync_dist`` only prevents a Lightning warning.
        self.log("val/loss", torch.stack(losses).mean(), sync_dist=True)
        recalls = retrieval_recalls(images, texts, numbers, captions)
        values = {f"val/{name}": value for name, value in recalls.items()}
        self.log_dict(values, sync_dist=True)

    def gather_validation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Collect all validation pairs over all devices, in the order of their numbers.

        Returns:
            The ids ``(N,)`` of images and of captions, and the features ``(N, E)`` of images and
            of captions.
        """
        examples, *rows_of_device = (torch.cat(part) for part in zip(*self.validated, strict=True))
        reduce: Any = self.trainer.strategy.reduce
        num_pairs = int(reduce(examples.max(), reduce_op="max")) + 1

        def sum_over_devices(rows: Tensor) -> Tensor:
            # Each device has some of the pairs; the sum of the devices' zero-filled tensors has
            # all pairs.
            all_rows = rows.new_zeros(num_pairs, *rows.shape[1:])
            all_rows[examples] = rows
            return reduce(all_rows, reduce_op="sum")

        numbers, captions, images, texts = (sum_over_devices(rows) for rows in rows_of_device)
        # With fewer pairs than devices, several devices hold the same pair; divide by their
        # number.
        num_copies = sum_over_devices(torch.ones_like(examples))
        features = images / num_copies[:, None], texts / num_copies[:, None]
        return numbers // num_copies, captions // num_copies, *features
