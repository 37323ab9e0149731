"""Numbers of one example: pictures against pictures, texts against texts."""

import re
import string
from collections import Counter

import torch
from torch import Tensor

PUNCTUATION = str.maketrans("", "", string.punctuation + "«»—–…")


def token_f1(prediction: str, truth: str) -> float:
    """F1 of the words of two texts, by how often each occurs; two empty texts agree.

    Lower case, no punctuation, split at spaces: SQuAD v1.1 evaluation without articles, which
    Russian does not have.
    """
    predicted, expected = (
        Counter(re.split(r"\s+", text.lower().translate(PUNCTUATION).strip()))
        for text in (prediction, truth)
    )
    shared = (predicted & expected).total()
    return 2 * shared / (predicted.total() + expected.total())


def nearest_ranks(images: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """The rank of each picture's own among all by pixel distance, ``(B,)``; 1 is the nearest.

    Args:
        images: ``(B, 3, H, W)``, on the scale of the gallery.
        gallery: ``(N, 3, H, W)``.
        own: ``(B,)``, the place of each picture's own in the gallery.
    """
    distances = torch.cdist(
        images.flatten(1).double(),
        gallery.flatten(1).double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    mine = distances.gather(1, own[:, None])
    return (distances < mine).sum(1) + 1
