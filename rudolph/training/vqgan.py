"""Training of the VQ-GAN, with an optional discriminator and perceptual loss.

Source: taming-transformers, ``models/vqgan.py``.
"""

import torch
from torch import Tensor, nn

from rudolph.data.examples import ImageBatch
from rudolph.models.image_metrics import psnr, ssim
from rudolph.models.vqgan.codes import codebook_usage
from rudolph.models.vqgan.model import VQGAN, Reconstruction
from rudolph.training.adversary import PatchDiscriminator, PerceptualDistance
from rudolph.training.callbacks import require_finite
from rudolph.training.losses import (
    ReconstructionLossConfig,
    adaptive_weight,
    hinge_discriminator_loss,
    reconstruction_loss,
)
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule


class VQGANTraining(ManualStepModule):
    """The training of a ``VQGAN``; with a discriminator, both networks step on every global batch.

    Logs PSNR in dB and SSIM of images in [0, 1], and the codebook's usage and perplexity.
    """

    def __init__(
        self,
        model: VQGAN,
        losses: ReconstructionLossConfig,
        optim: OptimConfig,
        *,
        num_accumulated: int = 1,
    ) -> None:
        super().__init__(optim, num_accumulated=num_accumulated)
        self.model, self.losses = model, losses
        has_discriminator = losses.discriminator_start is not None
        self.discriminator = PatchDiscriminator() if has_discriminator else None
        lpips_path = losses.lpips_weights
        self.perceptual = PerceptualDistance(lpips_path) if lpips_path else None
        # Not a buffer, because weight averaging swaps buffers before the counts are read.
        self.code_counts = torch.zeros(model.config.quantizer.num_codes)

    def networks(self) -> list[nn.Module]:
        """Return the VQ-GAN and, if there is one, the discriminator."""
        return [self.model] + ([self.discriminator] if self.discriminator is not None else [])

    def training_step(self, batch: ImageBatch, batch_index: int) -> None:
        """Accumulate gradients of a micro-batch, step at the end of a global batch, and log."""
        if self.discriminator is not None:
            # The generator's loss passes through the discriminator, which must not learn from it.
            self.discriminator.requires_grad_(False)
        result = self.model(batch.images)
        losses = self.generator_losses(result, batch.images, batch_index)
        require_finite(losses, step=self.step_index(batch_index), examples=batch.examples)
        self.backward_and_step(torch.stack(list(losses.values())).sum(), batch_index)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
        if self.discriminator is not None and self.uses_discriminator(batch_index):
            real, fake = batch.images, result.images.detach()
            discriminator_loss = hinge_discriminator_loss(
                self.discriminator(real), self.discriminator(fake)
            )
            self.backward_and_step(discriminator_loss, batch_index, network=1)
            losses["discriminator"] = discriminator_loss
        self.log_dict({f"train/loss/{name}": value for name, value in losses.items()})

    def generator_losses(
        self, result: Reconstruction, images: Tensor, batch_index: int
    ) -> dict[str, Tensor]:
        """Return each weighted term of the VQ-GAN's loss, a scalar by its name.

        Args:
            result: the reconstruction of ``images``.
            images: ``(B, 3, H, W)`` in [-1, 1].
            batch_index: the micro-batch, which decides whether the discriminator takes part.
        """
        reconstruction = reconstruction_loss(result.images, images, self.losses)
        if self.perceptual is not None:
            distance = self.perceptual(result.images.float(), images).mean()
            reconstruction = reconstruction + self.losses.perceptual_weight * distance
        losses = {"reconstruction": reconstruction}
        losses["quantizer"] = self.losses.quantizer_weight * result.loss.float()
        if self.discriminator is not None and self.uses_discriminator(batch_index):
            adversarial = -self.discriminator(result.images).float().mean()
            last_weight = self.model.decoder.conv_out.weight
            weight = adaptive_weight(reconstruction, adversarial, last_weight)
            losses["adversary"] = self.losses.discriminator_weight * weight * adversarial
        return losses

    def uses_discriminator(self, batch_index: int) -> bool:
        """Return whether the discriminator takes part in this micro-batch."""
        start = self.losses.discriminator_start
        return start is not None and self.step_index(batch_index) >= start

    def validation_step(self, batch: ImageBatch, batch_index: int) -> None:
        """Log the metrics of a validation batch and count its codes."""
        result = self.model(batch.images)
        decoded = (result.images.float().clamp(-1, 1) + 1) / 2
        target, size = (batch.images + 1) / 2, len(batch.images)
        values = {
            "val/psnr": psnr(decoded, target).mean(),
            "val/ssim": ssim(decoded, target).mean(),
            "val/loss/reconstruction": reconstruction_loss(
                result.images, batch.images, self.losses
            ),
        }
        self.log_dict(values, batch_size=size, sync_dist=True)
        counts = torch.bincount(result.indices.flatten(), minlength=len(self.code_counts))
        self.code_counts += counts.cpu()

    def on_validation_epoch_end(self) -> None:
        """Log codebook usage and perplexity over all devices, and reset the counts."""
        counts = self.trainer.strategy.reduce(self.code_counts.to(self.device), reduce_op="sum")
        usage, perplexity = codebook_usage(counts)
        # The values are equal on every device; ``sync_dist`` only prevents a Lightning warning.
        values = {"val/codebook_usage": usage, "val/codebook_perplexity": perplexity}
        self.log_dict(values, sync_dist=True)
        self.code_counts.zero_()
