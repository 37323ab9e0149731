"""A tokenizer, a VQ-GAN and a decoder that were trained together, as generation needs them.

Shapes: B images, I image tokens, H and W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.vqgan.model import VQGAN
from rudolph.sequence.tasks import TASKS, Texts, fill_texts
from rudolph.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageTokenizer:
    """A VQ-GAN in inference, ``batch_size`` images at a time; results are on the CPU."""

    vqgan: VQGAN
    batch_size: int = 64

    @property
    def device(self) -> torch.device:
        """The device of the VQ-GAN."""
        return next(self.vqgan.parameters()).device

    @property
    def num_codes(self) -> int:
        """The size of the codebook."""
        return self.vqgan.config.quantizer.num_codes

    def encode(self, images: Tensor) -> Tensor:
        """Encode images ``(B, 3, H, W)`` in [0, 1] as indices ``(B, I)``."""
        batches = torch.split(images, self.batch_size)
        return torch.cat(
            [self.vqgan.encode_indices(part.to(self.device)).cpu() for part in batches]
        )

    def decode(
        self, indices: Tensor, *, on_batch: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Decode indices ``(B, I)`` to images ``(B, 3, H, W)`` in [0, 1].

        Args:
            indices: ``(B, I)``, codebook indices.
            on_batch: called after each batch with the number of images done and the total.
        """
        parts = []
        for first in range(0, len(indices), self.batch_size):
            part = indices[first : first + self.batch_size].to(self.device)
            parts.append(self.vqgan.decode_indices(part).cpu())
            if on_batch is not None:
                on_batch(first + len(part), len(indices))
        return torch.cat(parts)


@dataclass
class TrainedModels:
    """A tokenizer, a VQ-GAN and a decoder in inference, ``batch_size`` rows at a time.

    Raises:
        ValueError: if ``batch_size`` is below 1.
    """

    tokenizer: Tokenizer
    vqgan: VQGAN
    decoder: MaskedDecoder
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check the batch size and switch both networks to evaluation mode."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self.vqgan.eval()
        self.decoder.eval()

    @property
    def device(self) -> torch.device:
        """The device of the decoder."""
        return self.decoder.final_norm.weight.device

    def texts(self, task: str, caption: str, *, other_text: str = "") -> Texts:
        """Fill the text segments of the layout with a caption for a task.

        Args:
            task: a name in ``TASKS``.
            caption: the text of the segment that holds the caption or the answer.
            other_text: the text of the other segment, such as the question.

        Raises:
            ValueError: if the task has a right text and the decoder does not.
        """
        if TASKS[task].right_token and not self.decoder.layout.right_text_length:
            raise ValueError(f"{task}: expected a decoder with a right text, got one without")
        return fill_texts(
            TASKS[task],
            caption,
            other_text=other_text,
            tokenizer=self.tokenizer,
            layout=self.decoder.layout,
            vocabulary=self.decoder.vocabulary,
        )

    def batches(self, num_prompts: int, num_rows: int) -> Iterator[tuple[slice, slice]]:
        """Yield each batch as a slice of prompts and a slice of rows.

        Each prompt has ``num_rows / num_prompts`` consecutive rows.  A batch holds some prompts
        with all of their rows, or some rows of one prompt.
        """
        num_samples = num_rows // num_prompts
        step = max(self.batch_size // num_samples, 1)
        for first in range(0, num_prompts, step):
            start, end = first * num_samples, min((first + step) * num_samples, num_rows)
            for row in range(start, end, self.batch_size):
                yield slice(first, first + step), slice(row, min(row + self.batch_size, end))

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """The VQ-GAN as an ``ImageTokenizer``."""
        return ImageTokenizer(self.vqgan, self.batch_size)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images ``(B, 3, H, W)`` in [0, 1] as indices ``(B, I)``, batch by batch."""
        return self.image_tokenizer.encode(images)

    def decode(
        self, indices: Tensor, *, on_batch: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Decode indices ``(B, I)`` to images ``(B, 3, H, W)`` in [0, 1], batch by batch."""
        return self.image_tokenizer.decode(indices, on_batch=on_batch)
