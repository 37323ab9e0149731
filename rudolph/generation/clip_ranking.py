"""Which images fit a text best, by CLIP; zero-shot classes; retrieval among many pairs.

Source: ruclip 0.0.2, ``ruclip/processor.py`` and ``predictor.py``; Radford 2021
(arXiv:2103.00020) for retrieval.

Shapes: B texts, P images, C classes, N pairs, L text tokens, E embedding dim, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.vision.clip import CLIP, MEAN, STD, pixel_values
from rudolph.sequence.tokenizer import Tokenizer

TEMPLATES = (
    "{}",
    "фото, на котором изображено {}",
    "изображение с {}",
    "картинка с {}",
    "фото с {}",
    "на фото видно {}",
)
# For a CLIP that was trained on captions as they are.
PLAIN_TEMPLATES = ("{}",)
# Rows of similarities that are in memory at once.
QUERIES_AT_ONCE = 1024
RECALLS_AT = (1, 5)


@dataclass
class ClipRanker:
    """A CLIP with its tokenizer; ``templates`` are averaged, as in the reference.

    Raises:
        ValueError: when the tokenizer has ids that the CLIP has not.
    """

    clip: CLIP
    tokenizer: Tokenizer
    templates: tuple[str, ...] = TEMPLATES
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    batch_size: int = 16

    def __post_init__(self) -> None:
        known, given = self.clip.config.vocab_size, self.tokenizer.vocab_size
        if given > known:
            raise ValueError(f"a tokenizer of this CLIP has at most {known} ids, got {given}")
        self.clip.eval()

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    def input_ids(self, texts: Sequence[str]) -> Tensor:
        """``BOS ids EOS`` of each text, padded to the context, ``(B, L)``; a long text is cut."""
        length = self.clip.config.context_length
        return torch.stack([self.tokenizer.encode_segment(text, length).ids for text in texts])

    def pixel_values(self, images: Tensor) -> Tensor:
        """Images ``(P, 3, H, W)`` in [0, 1] as the model reads them: centre square, resized."""
        size = self.clip.config.image_resolution
        return pixel_values(images, size, mean=self.mean, std=self.std)

    @torch.inference_mode()
    def features(
        self, images: Tensor, *, on_batch: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Features ``(P, E)`` of images ``(P, 3, H, W)`` in [0, 1], not normalised, on the CPU.

        What distances between sets of images (FID, KID) are taken of.
        """
        dtype = self.clip.visual.conv1.weight.dtype
        features = torch.zeros(len(images), self.clip.config.embed_dim)
        for first in range(0, len(images), self.batch_size):
            rows = slice(first, first + self.batch_size)
            pixels = self.pixel_values(images[rows].to(self.device)).to(dtype)
            features[rows] = self.clip.encode_image(pixels).float().cpu()
            if on_batch is not None:
                on_batch(min(first + self.batch_size, len(images)), len(images))
        return features

    def image_features(
        self, images: Tensor, *, on_batch: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Normalised features ``(P, E)`` of images ``(P, 3, H, W)`` in [0, 1]."""
        return F.normalize(self.features(images, on_batch=on_batch), dim=-1)

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
        """Cosines ``(P, B)`` of images ``(P, 3, H, W)`` in [0, 1] and texts; more is better."""
        return self.image_features(images, on_batch=on_batch) @ self.text_features(texts).t()

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        """Zero-shot probabilities ``(P, C)``."""
        scale = self.clip.logit_scale.detach().float().exp().cpu()
        return (scale * self.similarities(images, classes)).softmax(-1)


def retrieval_recalls(
    images: Tensor,
    texts: Tensor,
    image_numbers: Tensor,
    captions: Tensor,
    *,
    at: Sequence[int] = RECALLS_AT,
) -> dict[str, float]:
    """Recall at k both ways: the share of queries with a right answer among the first k.

    Pairs may share a caption or an image.  Each then asks and is found once, and any of its own
    answers is right.  What is as similar as the right answer counts as before it, so that features
    that are all alike find nothing.

    Args:
        images: ``(N, E)``, normalised features of the images.
        texts: ``(N, E)``, those of their captions.
        image_numbers: ``(N,)`` int64, equal where images are equal.
        captions: ``(N,)`` int64, equal where captions are equal texts.

    Returns:
        ``image_to_text/recall_at_1`` and so on, each in [0, 1].
    """
    gallery = RetrievalSet.of(image_numbers, captions)
    ranks = gallery.ranks(images[gallery.images], texts[gallery.texts])
    return {
        f"{way}/recall_at_{k}": (rank <= k).double().mean().item()
        for way, rank in ranks.items()
        for k in at
    }


class RetrievalSet(NamedTuple):
    """The different images and texts of pairs, and which of them belong together.

    ``images`` (P,) and ``texts`` (B,) are the pairs in which each stands first; ``right`` (R, 2)
    are the places of an image and of a text that some pair puts together.
    """

    images: Tensor
    texts: Tensor
    right: Tensor

    @classmethod
    def of(cls, image_numbers: Tensor, captions: Tensor) -> "RetrievalSet":
        """The gallery of pairs whose images and captions have these numbers, ``(N,)`` each."""
        sides = [
            np.unique(numbers.cpu().numpy(), return_index=True, return_inverse=True)[1:]
            for numbers in (image_numbers, captions)
        ]
        (images, image_places), (texts, text_places) = sides
        right = np.unique(np.stack([image_places, text_places], axis=1), axis=0)
        every = (torch.from_numpy(each).to(captions.device) for each in (images, texts, right))
        return cls(*every)

    def ranks(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Ranks both ways by normalised features of ``images`` (P, E) and ``texts`` (B, E)."""
        return {
            "image_to_text": retrieval_ranks(images, texts, self.right),
            "text_to_image": retrieval_ranks(texts, images, self.right.flip(1)),
        }


def retrieval_ranks(queries: Tensor, gallery: Tensor, right: Tensor) -> Tensor:
    """The rank of each query's best right answer, ``(Q,)`` int64; 1 is the most similar.

    Other right answers are not counted.

    Args:
        queries: ``(Q, E)``, normalised; ``gallery``: ``(G, E)``, what they are answered from.
        right: ``(R, 2)``, the places of a query and of an answer that is right.
    """
    ranks = []
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        similarities = queries[first : first + QUERIES_AT_ONCE] @ gallery.t()
        own = right[(right[:, 0] >= first) & (right[:, 0] < first + QUERIES_AT_ONCE)]
        is_right = torch.zeros_like(similarities, dtype=torch.bool)
        is_right[own[:, 0] - first, own[:, 1]] = True
        best = similarities.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        # Not ">=": what is not a number is no answer either.
        ranks.append(1 + (~(similarities < best) & ~is_right).sum(1))
    return torch.cat(ranks)
