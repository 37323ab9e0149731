"""Training of the VQ-GAN, with an optional discriminator and perceptual loss.

Source: taming-transformers, ``models/vqgan.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rudolph.data.examples import ImageBatch
from rudolph.models.image_metrics import psnr, ssim
from rudolph.models.layers.native_types import sum_dtype
from rudolph.models.vqgan.codes import codebook_usage
from rudolph.models.vqgan.model import VQGAN, Reconstruction
from rudolph.models.vqgan.quantizers import ExponentialMovingAverageQuantizer
from rudolph.training.adversary import PatchDiscriminator, PerceptualDistance
from rudolph.training.losses import (
    ReconstructionLossConfig,
    adaptive_weight,
    hinge_discriminator_loss,
    reconstruction_loss,
)
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule

# The terms of the loss, in the order of the sums of ``VQGANTraining.accumulate``.
LOSS_TERMS = ("reconstruction", "quantizer", "adversary", "discriminator")


class VQGANTraining(ManualStepModule):
    """The training of a ``VQGAN``; with a discriminator, both networks step on every global batch.

    It logs PSNR (in dB) and SSIM of images in [0, 1], and the codebook's usage and perplexity.

    Three quantities are computed per micro-batch: the adaptive weight of the adversary, the
    entropy loss of ``lfq``, and the statistics of the discriminator's batch normalisation.
    """

    def __init__(self, model: VQGAN, losses: ReconstructionLossConfig, optim: OptimConfig) -> None:
        super().__init__(optim)
        self.model, self.losses = model, losses
        has_discriminator = losses.discriminator_start is not None
        self.discriminator = PatchDiscriminator() if has_discriminator else None
        lpips_path = losses.lpips_weights
        self.perceptual = PerceptualDistance(lpips_path) if lpips_path else None
        # Latents and codes of the step, for a codebook that follows running statistics.
        self.step_codes: list[tuple[Tensor, Tensor]] = []
        # Not buffers, because weight averaging swaps buffers before the sums are read.
        self.code_counts = torch.zeros(model.config.quantizer.num_codes)
        self.metric_sums = torch.zeros(4, dtype=torch.float64)

    def networks(self) -> list[nn.Module]:
        """Return the VQ-GAN and, if there is one, the discriminator."""
        return [self.model] + ([self.discriminator] if self.discriminator is not None else [])

    def trains(self, network: int, step: int) -> bool:
        """Return whether a network takes this step; the discriminator waits for its first step."""
        return network == 0 or self.uses_discriminator(step)

    def start_step(self, batches: Sequence[ImageBatch], step: int) -> None:
        """Initialise the codebook from the latents of the first global batch."""
        quantizer = self.model.quantize
        if isinstance(quantizer, ExponentialMovingAverageQuantizer) and not quantizer.is_started:
            with torch.no_grad():
                quantizer.start(torch.cat([self.model.latents(each.images) for each in batches]))
            # Clear the weights that autocast cached under ``no_grad``: they have no graph.
            torch.clear_autocast_cache()

    def accumulate(self, batch: ImageBatch, step: int, totals: Tensor) -> Tensor:
        """Add the gradients of a micro-batch; return its part of each term of the loss."""
        share = len(batch.images) / float(totals)
        if self.discriminator is not None:
            # The generator's loss passes through the discriminator, which must not learn from it.
            self.discriminator.requires_grad_(False)
        latents = self.model.latents(batch.images)
        result = self.model.reconstruct(latents)
        losses = self.generator_losses(result, batch.images, step)
        self.add_gradients(torch.stack(list(losses.values())).sum() * share)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
        if self.discriminator is not None and self.uses_discriminator(step):
            real, fake = batch.images, result.images.detach()
            discriminator_loss = hinge_discriminator_loss(
                self.discriminator(real), self.discriminator(fake)
            )
            self.add_gradients(discriminator_loss * share, network=1)
            losses["discriminator"] = discriminator_loss
        if isinstance(self.model.quantize, ExponentialMovingAverageQuantizer):
            self.step_codes.append((latents.detach(), result.indices))
        zero = torch.zeros((), dtype=sum_dtype(self.device), device=self.device)
        terms = [losses.get(name, zero).detach().to(zero.dtype) for name in LOSS_TERMS]
        return torch.stack(terms) * share

    def step_losses(self, sums: Tensor, step: int, totals: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss that this step has."""
        number = len(LOSS_TERMS) if self.uses_discriminator(step) else 2
        named = list(zip(LOSS_TERMS, sums, strict=True))[:number]
        return {f"loss/{name}": value for name, value in named}

    def finish_step(self, step: int, totals: Tensor) -> None:
        """Update the codebook from the step's latents, if it keeps running statistics."""
        if self.step_codes:
            latents, indices = (torch.cat(parts) for parts in zip(*self.step_codes, strict=True))
            self.model.quantize.update_codebook(latents, indices)
            self.step_codes = []

    def generator_losses(
        self, result: Reconstruction, images: Tensor, step: int
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the VQ-GAN's loss: scalars keyed by name.

        Args:
            result: the reconstruction of ``images``.
            images: ``(B, 3, H, W)`` in [-1, 1].
            step: the optimizer step, which decides whether the discriminator takes part.
        """
        reconstruction = reconstruction_loss(result.images, images, self.losses)
        if self.perceptual is not None:
            distance = self.perceptual(result.images.float(), images).mean()
            reconstruction = reconstruction + self.losses.perceptual_weight * distance
        losses = {"reconstruction": reconstruction}
        losses["quantizer"] = self.losses.quantizer_weight * result.loss.float()
        if self.discriminator is not None and self.uses_discriminator(step):
            adversarial = -self.discriminator(result.images).float().mean()
            last_weight = self.model.decoder.conv_out.weight
            weight = adaptive_weight(reconstruction, adversarial, last_weight)
            losses["adversary"] = self.losses.discriminator_weight * weight * adversarial
        return losses

    def uses_discriminator(self, step: int) -> bool:
        """Return whether the discriminator takes part in this step."""
        start = self.losses.discriminator_start
        return start is not None and step >= start

    def on_validation_epoch_start(self) -> None:
        """Reset the counts of codes and the sums of metrics."""
        self.code_counts.zero_()
        self.metric_sums.zero_()

    def validation_step(self, batch: ImageBatch, batch_index: int) -> None:
        """Add the metrics and the codes of a validation batch."""
        result = self.model(batch.images)
        decoded = (result.images.float().clamp(-1, 1) + 1) / 2
        target, size = (batch.images + 1) / 2, len(batch.images)
        loss = reconstruction_loss(result.images, batch.images, self.losses)
        values = psnr(decoded, target).mean(), ssim(decoded, target).mean(), loss
        self.metric_sums += torch.tensor([*(size * value.item() for value in values), size])
        counts = torch.bincount(result.indices.flatten(), minlength=len(self.code_counts))
        self.code_counts += counts.cpu()

    def on_validation_epoch_end(self) -> None:
        """Log the mean metrics, codebook usage and perplexity over all devices."""
        metric_sums = self.metric_sums.to(self.device, sum_dtype(self.device))
        *sums, number = self.sum_over_devices(metric_sums)
        usage, perplexity = codebook_usage(self.sum_over_devices(self.code_counts.to(self.device)))
        names = "val/psnr", "val/ssim", "val/loss/reconstruction"
        values = {name: (total / number).float() for name, total in zip(names, sums, strict=True)}
        values |= {"val/codebook_usage": usage, "val/codebook_perplexity": perplexity}
        # The values are equal on every device; ``sync_dist`` only prevents a Lightning warning.
        self.log_dict(values, sync_dist=True)
