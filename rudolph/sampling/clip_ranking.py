"""Which pictures fit a text best, by CLIP; zero-shot classes; its own text and picture inputs.

Source: ruclip 0.0.2, ``ruclip/processor.py`` and ``predictor.py``.

Shapes: B texts, P pictures, C classes, L text tokens, E embedding dim, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.clip import CLIP
from rudolph.sequence.tokenizer import Tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TEMPLATES = (
    "{}",
    "фото, на котором изображено {}",
    "изображение с {}",
    "картинка с {}",
    "фото с {}",
    "на фото видно {}",
)


@dataclass
class ClipRanker:
    """A CLIP with its tokenizer; ``templates`` are averaged, as in the reference."""

    clip: CLIP
    tokenizer: Tokenizer
    templates: tuple[str, ...] = TEMPLATES
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    batch_size: int = 16

    def __post_init__(self) -> None:
        self.clip.eval()

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    def input_ids(self, texts: Sequence[str]) -> Tensor:
        """``BOS ids EOS`` of each text, padded to the context, ``(B, L)``; a long text is cut."""
        length = self.clip.config.context_length
        return torch.stack([self.tokenizer.encode_segment(text, length).ids for text in texts])

    def pixel_values(self, images: Tensor) -> Tensor:
        """Pictures ``(P, 3, H, W)`` in [0, 1] as the model reads them: centre square, resized."""
        side = min(images.shape[-2:])
        top, left = ((size - side) // 2 for size in images.shape[-2:])
        square = images[..., top : top + side, left : left + side]
        size = self.clip.config.image_resolution
        resized = F.interpolate(square.float(), (size, size), mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (resized - mean) / std

    @torch.inference_mode()
    def image_features(
        self, images: Tensor, *, on_batch: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Normalised features ``(P, E)`` of pictures ``(P, 3, H, W)`` in [0, 1]."""
        dtype = self.clip.visual.conv1.weight.dtype
        features = torch.zeros(len(images), self.clip.config.embed_dim)
        for first in range(0, len(images), self.batch_size):
            rows = slice(first, first + self.batch_size)
            pixels = self.pixel_values(images[rows].to(self.device)).to(dtype)
            features[rows] = self.clip.encode_image(pixels).float().cpu()
            if on_batch is not None:
                on_batch(min(first + self.batch_size, len(images)), len(images))
        return F.normalize(features, dim=-1)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Normalised features ``(B, E)``: each text in every template, averaged before that."""
        total = torch.zeros(len(texts), self.clip.config.embed_dim)
        for template in self.templates:
            ids = self.input_ids([template.format(text) for text in texts])
            for first in range(0, len(ids), self.batch_size):
                rows = slice(first, first + self.batch_size)
                total[rows] += self.clip.encode_text(ids[rows].to(self.device)).float().cpu()
        return F.normalize(total / len(self.templates), dim=-1)

    def similarities(
        self,
        images: Tensor,
        texts: Sequence[str],
        *,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Cosines ``(P, B)`` of pictures ``(P, 3, H, W)`` in [0, 1] and texts; more is better."""
        return self.image_features(images, on_batch=on_batch) @ self.text_features(texts).t()

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        """Zero-shot probabilities ``(P, C)``."""
        scale = self.clip.logit_scale.detach().float().exp().cpu()
        return (scale * self.similarities(images, classes)).softmax(-1)
