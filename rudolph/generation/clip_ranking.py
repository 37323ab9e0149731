"""CLIP scores: rank images for a text, classify zero-shot, and measure retrieval among pairs.

Source: ruclip 0.0.2, ``ruclip/processor.py`` and ``predictor.py``; Radford 2021 (arXiv:2103.00020)
for retrieval.

Shapes: B texts, P images, C classes, N pairs, Q queries, G gallery items, R right answers, L text
tokens, E embedding dim, H and W pixels.
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
# For a CLIP that was trained on plain captions.
PLAIN_TEMPLATES = ("{}",)
# The number of similarity rows held in memory at once.
MAX_QUERIES_IN_MEMORY = 1024
RECALLS_AT = (1, 5)


@dataclass
class ClipRanker:
    """A CLIP with its tokenizer; text features are averaged over ``templates``, as in ruclip.

    ``mean`` and ``std`` normalise each channel, and ``batch_size`` texts or images are encoded at
    once.

    Raises:
        ValueError: if the tokenizer has more ids than the CLIP.
    """

    clip: CLIP
    tokenizer: Tokenizer
    templates: tuple[str, ...] = TEMPLATES
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Check the vocabulary size and switch the CLIP to evaluation mode."""
        num_clip_ids, num_tokenizer_ids = self.clip.config.vocab_size, self.tokenizer.vocab_size
        if num_tokenizer_ids > num_clip_ids:
            raise ValueError(
                f"tokenizer: expected at most {num_clip_ids} ids, as in the CLIP, "
                f"got {num_tokenizer_ids}"
            )
        self.clip.eval()

    @property
    def device(self) -> torch.device:
        """The device of the CLIP."""
        return self.clip.logit_scale.device

    def input_ids(self, texts: Sequence[str]) -> Tensor:
        """Encode each text as ``BOS ids EOS``, padded or cut to the context length, ``(B, L)``."""
        length = self.clip.config.context_length
        return torch.stack([self.tokenizer.encode_segment(text, length).ids for text in texts])

    def pixel_values(self, images: Tensor) -> Tensor:
        """Crop images ``(P, 3, H, W)`` in [0, 1] to the centre square, resize and normalise."""
        size = self.clip.config.image_resolution
        return pixel_values(images, size, mean=self.mean, std=self.std)

    @torch.inference_mode()
    def features(
        self, images: Tensor, *, on_batch: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Return unnormalised features ``(P, E)`` of images ``(P, 3, H, W)`` in [0, 1].

        FID and KID compare sets of images by these features.  They are float32, on the CPU.
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
        """Return normalised features ``(P, E)`` of images ``(P, 3, H, W)`` in [0, 1]."""
        return F.normalize(self.features(images, on_batch=on_batch), dim=-1)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return normalised features ``(B, E)``, averaged over templates before normalisation."""
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
        """Return the cosine similarities ``(P, B)`` of images and texts.

        Images are ``(P, 3, H, W)`` in [0, 1].
        """
        return self.image_features(images, on_batch=on_batch) @ self.text_features(texts).t()

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        """Return zero-shot class probabilities ``(P, C)`` of images ``(P, 3, H, W)`` in [0, 1]."""
        scale = self.clip.logit_scale.detach().float().exp().cpu()
        return (scale * self.similarities(images, classes)).softmax(-1)


def retrieval_recalls(
    images: Tensor,
    texts: Tensor,
    image_numbers: Tensor,
    captions: Tensor,
    *,
    top_ks: Sequence[int] = RECALLS_AT,
) -> dict[str, float]:
    """Compute recall at k in both directions: the fraction of queries answered in the top k.

    Pairs may share a caption or an image.  Each distinct image or text counts once, and each of
    its partners is a right answer.  A gallery item that ties with the right answer ranks before
    it, so constant features gain nothing.

    Args:
        images: ``(N, E)``, normalised image features.
        texts: ``(N, E)``, normalised caption features.
        image_numbers: ``(N,)`` int64, equal where images are equal.
        captions: ``(N,)`` int64, equal where captions are equal texts.
        top_ks: the values of k.

    Returns:
        ``image_to_text/recall_at_1`` and so on, each in [0, 1].
    """
    gallery = RetrievalSet.of(image_numbers, captions)
    ranks = gallery.ranks(images[gallery.images], texts[gallery.texts])
    return {
        f"{direction}/recall_at_{k}": (rank <= k).double().mean().item()
        for direction, rank in ranks.items()
        for k in top_ks
    }


class RetrievalSet(NamedTuple):
    """The distinct images and texts of some pairs, and which of them belong together.

    ``images`` (P,) and ``texts`` (B,) hold the index of the first pair with each image or text.
    ``matches`` (R, 2) holds the positions of an image and a text that form a pair.
    """

    images: Tensor
    texts: Tensor
    matches: Tensor

    @classmethod
    def of(cls, image_numbers: Tensor, captions: Tensor) -> "RetrievalSet":
        """Build the set from the image numbers and caption numbers of all pairs, ``(N,)`` each."""
        unique_sides = [
            np.unique(numbers.cpu().numpy(), return_index=True, return_inverse=True)[1:]
            for numbers in (image_numbers, captions)
        ]
        (images, image_indices), (texts, text_indices) = unique_sides
        matches = np.unique(np.stack([image_indices, text_indices], axis=1), axis=0)
        tensors = (
            torch.from_numpy(values).to(captions.device) for values in (images, texts, matches)
        )
        return cls(*tensors)

    def ranks(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Compute ranks in both directions from normalised features.

        Args:
            images: ``(P, E)``, features of the distinct images.
            texts: ``(B, E)``, features of the distinct texts.
        """
        return {
            "image_to_text": retrieval_ranks(images, texts, self.matches),
            "text_to_image": retrieval_ranks(texts, images, self.matches.flip(1)),
        }


def retrieval_ranks(queries: Tensor, gallery: Tensor, matches: Tensor) -> Tensor:
    """Return the rank ``(Q,)`` int64 of each query's best right answer; 1 is the most similar.

    Other right answers of a query do not count towards the rank.

    Args:
        queries: ``(Q, E)``, normalised features.
        gallery: ``(G, E)``, normalised features of the candidates.
        matches: ``(R, 2)``, the positions of a query and of one of its right answers.
    """
    ranks = []
    for first in range(0, len(queries), MAX_QUERIES_IN_MEMORY):
        similarities = queries[first : first + MAX_QUERIES_IN_MEMORY] @ gallery.t()
        block_matches = matches[
            (matches[:, 0] >= first) & (matches[:, 0] < first + MAX_QUERIES_IN_MEMORY)
        ]
        is_match = torch.zeros_like(similarities, dtype=torch.bool)
        is_match[block_matches[:, 0] - first, block_matches[:, 1]] = True
        best = similarities.masked_fill(~is_match, -torch.inf).amax(1, keepdim=True)
        # Not ">=", so that a NaN similarity never improves a rank.
        ranks.append(1 + (~(similarities < best) & ~is_match).sum(1))
    return torch.cat(ranks)
