"""CLIP in training: images and captions of one batch find each other.

Every pair of a batch is compared with every other, on all devices, so a batch is never parted.
Several pairs may share a caption, and each image of it fits: the softmax loss leaves the other
pairs of a caption out of its sums, the sigmoid loss judges each combination alone and calls them
matches.

Source: Radford 2021 (arXiv:2103.00020); open_clip for the bounds of the scale; Zhai 2023, SigLIP
(arXiv:2303.15343); Zhai 2021, LiT (arXiv:2111.07991).

Shapes: B pairs of a batch, N pairs in all, E embedding dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.data.text_image import TextImageBatch
from rudolph.generation.clip_ranking import retrieval_recalls
from rudolph.models.vision.clip import CLIP
from rudolph.training.callbacks import require_finite
from rudolph.training.clip_losses import (
    CLIP_LOSSES,
    LARGEST_SCALE,
    CLIPLossConfig,
    require_bias,
)
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule


def prepare_for(model: CLIP, losses: CLIPLossConfig) -> None:
    """Give a CLIP the first scale and bias of a loss and lock the tower that it freezes.

    Raises:
        ValueError: when the model has a bias that the loss does not learn, or lacks one.
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
    """Trains a ``CLIP`` on ``TextImageBatch``; validates by loss and retrieval.

    Logs ``val/loss`` over groups of ``global_batch_size`` pairs, as in training, and the recalls
    of ``retrieval_recalls`` among all validation pairs.

    Raises:
        ValueError: for a batch in parts, or a model that does not fit the loss.
    """

    def __init__(
        self, model: CLIP, losses: CLIPLossConfig, optim: OptimConfig, *, num_accumulated: int = 1
    ) -> None:
        super().__init__(optim, num_accumulated=num_accumulated)
        if num_accumulated != 1:
            raise ValueError(
                f"global_batch_size must pass at once, since all its pairs are compared: "
                f"got {num_accumulated} parts of {optim.global_batch_size}"
            )
        prepare_for(model, losses)
        self.model, self.losses = model, losses
        self.validated: list[tuple[Tensor, ...]] = []

    def networks(self) -> list[nn.Module]:
        return [self.model]

    def training_step(self, batch: TextImageBatch, batch_index: int) -> None:
        images, texts = (self.of_all_devices(each) for each in self.features(batch))
        numbers = (self.of_all_devices(each) for each in (batch.image_numbers, batch.captions))
        loss = self.loss(images, texts, *numbers)
        losses = {self.losses.kind: loss}
        require_finite(losses, step=self.step_of(batch_index), examples=batch.examples)
        self.move(loss, batch_index)
        if self.losses.kind == "softmax":
            self.model.logit_scale.data.clamp_(0, math.log(LARGEST_SCALE))
        self.log_dict({"train/loss": loss, "train/logit_scale": self.model.logit_scale.exp()})

    def features(self, batch: TextImageBatch) -> tuple[Tensor, Tensor]:
        """Normalised features ``(B, E)`` of images and of captions, in float32."""
        images = self.model.encode_image(batch.pixel_values)
        texts = self.model.encode_text(batch.input_ids)
        return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)

    def of_all_devices(self, rows: Tensor) -> Tensor:
        """The rows of every device, one device after the other; gradients go back to its own."""
        world = self.trainer.world_size
        if world == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(world)]
        # Lightning's own gathers by what torch says is deprecated.
        torch.distributed.all_gather(gathered, rows.detach())
        gathered[self.global_rank] = rows
        if rows.requires_grad:
            # Every device has the loss of all pairs, and the mean over devices is what is stepped.
            rows.register_hook(lambda gradient: gradient * world)  # type: ignore[no-untyped-call]
        return torch.cat(gathered)

    def loss(
        self, images: Tensor, texts: Tensor, image_numbers: Tensor, captions: Tensor
    ) -> Tensor:
        """The loss of features ``(B, E)`` of pairs with these numbers of images and captions."""
        # Mixed precision would round logits near 100 to halves.
        with torch.autocast(images.device.type, enabled=False):
            logits = self.model.logits(images, texts)
        is_match = (captions[:, None] == captions) | (image_numbers[:, None] == image_numbers)
        return CLIP_LOSSES[self.losses.kind](logits, is_match)

    def on_validation_epoch_start(self) -> None:
        self.validated = []

    def validation_step(self, batch: TextImageBatch, batch_index: int) -> None:
        numbers = batch.image_numbers, batch.captions
        self.validated.append((batch.examples, *numbers, *self.features(batch)))

    def on_validation_epoch_end(self) -> None:
        numbers, captions, images, texts = self.whole_validation()
        size = self.optim.global_batch_size
        starts = range(0, max(len(captions) - size, 0) + 1, size)
        groups = [slice(first, first + size) for first in starts]
        parts = [
            [all_of[each] for all_of in (images, texts, numbers, captions)] for each in groups
        ]
        losses = [self.loss(*each) for each in parts]
        # Every device has them all; without the flag Lightning warns.
        self.log("val/loss", torch.stack(losses).mean(), sync_dist=True)
        recalls = retrieval_recalls(images, texts, numbers, captions)
        values = {f"val/{name}": value for name, value in recalls.items()}
        self.log_dict(values, sync_dist=True)

    def whole_validation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Numbers of images and captions ``(N,)`` and features ``(N, E)`` of all pairs."""
        examples, *found = (torch.cat(part) for part in zip(*self.validated, strict=True))
        reduce: Any = self.trainer.strategy.reduce
        num_pairs = int(reduce(examples.max(), reduce_op="max")) + 1

        def placed(rows: Tensor) -> Tensor:
            # Each device has some of the pairs; the sum with zeros has all.
            whole = rows.new_zeros(num_pairs, *rows.shape[1:])
            whole[examples] = rows
            return reduce(whole, reduce_op="sum")

        numbers, captions, images, texts = (placed(rows) for rows in found)
        # Of fewer pairs than devices some devices have the same.
        times = placed(torch.ones_like(examples))
        features = images / times[:, None], texts / times[:, None]
        return numbers // times, captions // times, *features
