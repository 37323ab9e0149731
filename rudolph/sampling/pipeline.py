"""Text to pictures and pictures to text with a trained tokenizer, VQ-GAN and decoder.

Shapes: B texts or pictures, S samples of each, I image tokens, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rudolph.models.decoder import MaskedDecoder
from rudolph.models.vqgan import VQGAN
from rudolph.sampling.filters import TokenSamplingConfig
from rudolph.sampling.generate import generate_image, generate_right_text
from rudolph.sequence.layout import EOS, PAD
from rudolph.sequence.tasks import TASKS, Texts, fill_texts
from rudolph.sequence.tokenizer import Tokenizer

OnToken = Callable[[int, int], None]


@dataclass
class Pipeline:
    """The three parts that were trained together, and how they are asked.

    Tensors come and go on the CPU, wherever the parts are.
    """

    tokenizer: Tokenizer
    vqgan: VQGAN
    decoder: MaskedDecoder
    batch_size: int = 64

    def __post_init__(self) -> None:
        self.vqgan.eval()
        self.decoder.eval()

    @property
    def device(self) -> torch.device:
        return self.decoder.to_logits.weight.device

    def to(self, device: torch.device | str) -> "Pipeline":
        """Move both networks."""
        self.vqgan.to(device)
        self.decoder.to(device)
        return self

    def texts(self, task: str, caption: str) -> Texts:
        """How a caption fills the layout for a task."""
        return fill_texts(
            TASKS[task],
            caption,
            tokenizer=self.tokenizer,
            layout=self.decoder.layout,
            vocabulary=self.decoder.vocabulary,
        )

    def generate(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Pictures ``(B * S, 3, H, W)`` in [0, 1], S of each caption by ``seeds`` (B * S)."""
        indices = self.generate_indices(captions, config=config, seeds=seeds, on_token=on_token)
        return self.decode(indices)

    def generate_indices(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Image indices ``(B * S, I)``; see ``generate``."""
        if not captions or len(seeds) % len(captions):
            raise ValueError(
                f"seeds must be as many for each of {len(captions)} captions, got {len(seeds)}"
            )
        num_samples = len(seeds) // len(captions)
        left = torch.stack([self.texts("text_to_image", caption).left for caption in captions])
        empty = self.texts("text_to_image", "").left
        step = max(self.batch_size // num_samples, 1)
        total = len(seeds) * self.decoder.layout.num_image_tokens
        parts = []
        for first in range(0, len(captions), step):
            own = seeds[first * num_samples : (first + step) * num_samples]
            done = first * num_samples * self.decoder.layout.num_image_tokens
            parts.append(
                generate_image(
                    self.decoder,
                    left[first : first + step].to(self.device),
                    config=config,
                    seeds=own,
                    unconditional=empty.to(self.device),
                    on_token=_counted(on_token, done, len(own), total),
                ).cpu()
            )
        return torch.cat(parts)

    def caption(
        self,
        images: Tensor,
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Captions of pictures ``(B, 3, H, W)`` in [0, 1], S of each by ``seeds`` (B * S)."""
        if not len(images) or len(seeds) % len(images):
            raise ValueError(
                f"seeds must be as many for each of {len(images)} pictures, got {len(seeds)}"
            )
        num_samples = len(seeds) // len(images)
        prompt = self.texts("image_captioning", "")
        length = int((prompt.right != PAD).sum()) - int((prompt.right == EOS).sum())
        captions: list[str] = []
        step = max(self.batch_size // num_samples, 1)
        for first in range(0, len(images), step):
            indices = self.encode(images[first : first + step])
            left = prompt.left.expand(len(indices), -1)
            right = prompt.right[:length].expand(len(indices), -1)
            tokens = torch.cat([left, indices, right], dim=1)
            own = seeds[first * num_samples : (first + step) * num_samples]
            num_new = self.decoder.layout.right_text_length - length
            drawn = generate_right_text(
                self.decoder,
                tokens.to(self.device),
                config=config,
                seeds=own,
                on_token=_counted(
                    on_token, first * num_samples * num_new, len(own), len(seeds) * num_new
                ),
            )
            captions += [self.tokenizer.decode(ids) for ids in drawn.tolist()]
        return captions

    def encode(self, images: Tensor) -> Tensor:
        """Indices ``(B, I)`` of pictures ``(B, 3, H, W)`` in [0, 1], batch by batch."""
        batches = torch.split(images, self.batch_size)
        return torch.cat(
            [self.vqgan.encode_indices(part.to(self.device)).cpu() for part in batches]
        )

    def decode(self, indices: Tensor) -> Tensor:
        """Pictures of indices ``(B, I)``, batch by batch."""
        batches = torch.split(indices, self.batch_size)
        return torch.cat(
            [self.vqgan.decode_indices(part.to(self.device)).cpu() for part in batches]
        )


def _counted(
    on_token: OnToken | None, done: int, size: int, total: int
) -> Callable[[int], None] | None:
    """Progress of one batch as progress of all."""
    if on_token is None:
        return None
    return lambda step: on_token(done + step * size, total)
