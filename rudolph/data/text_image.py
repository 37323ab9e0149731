"""Training examples for CLIP: caption and image of a pair, in CLIP's input format.

Only the order of the pairs is random.  Images are never mirrored, because captions of synthetic
shapes distinguish left from right.

Shapes: N pairs, B batch size, L text tokens, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.cache import cached_array
from rudolph.data.seeds import shuffled_pairs
from rudolph.data.splits import Split
from rudolph.models.vision.clip import CLIPConfig, pixel_values
from rudolph.sequence.tokenizer import Tokenizer, normalize_unicode


class TextImageBatch(NamedTuple):
    """A batch for CLIP: ``input_ids`` ``(B, L)`` and ``pixel_values`` ``(B, 3, H, W)``.

    ``captions`` ``(B,)`` numbers the captions: equal captions have equal numbers in all batches.
    ``image_ids`` ``(B,)`` numbers the images in the same way.  ``examples`` ``(B,)`` holds the
    indices of the pairs.
    """

    input_ids: Tensor
    pixel_values: Tensor
    captions: Tensor
    image_ids: Tensor
    examples: Tensor


class TextImageExamples:
    """Training examples for CLIP from one split.

    ``num_cut`` counts the captions that exceed the context length and lose their end.

    Raises:
        ValueError: If the tokenizer has more ids than CLIP's vocabulary.
    """

    def __init__(
        self, split: Split, tokenizer: Tokenizer, config: CLIPConfig, *, seed: int
    ) -> None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"vocab_size must be at least {tokenizer.vocab_size}, the ids of the tokenizer, "
                f"got {config.vocab_size}"
            )
        self.split, self.seed, self.num_whole = split, seed, len(split)
        self.image_resolution = config.image_resolution
        kind, length = "texts of CLIP", config.context_length
        self.input_ids, self.num_cut = encoded_texts(
            split, split.captions, tokenizer, length, kind=kind
        )
        self.captions = caption_ids(split.captions)

    def note(self) -> str:
        """Return one line with the number of cut captions."""
        return f"{self.num_cut} of {self.num_whole} captions are too long and cut"

    def batch(self, numbers: Sequence[int]) -> TextImageBatch:
        """Return the training batch of these example numbers; every epoch is a new permutation."""
        return self._pairs(shuffled_pairs(numbers, self.num_whole, self.seed))

    def whole(self, indices: Sequence[int]) -> TextImageBatch:
        """Return the pairs at ``indices``, unshuffled, for validation."""
        return self._pairs(np.asarray(indices))

    def _pairs(self, indices: np.ndarray[Any, Any]) -> TextImageBatch:
        pixels = pixel_values(self.split.image_batch(indices), self.image_resolution)
        ids = torch.from_numpy(self.input_ids[indices].astype(np.int64))
        captions = torch.from_numpy(self.captions[indices])
        image_ids = torch.from_numpy(self.split.clusters(indices))
        return TextImageBatch(ids, pixels, captions, image_ids, torch.from_numpy(indices))


def encoded_texts(
    split: Split, texts: Sequence[str], tokenizer: Tokenizer, context_length: int, *, kind: str
) -> tuple[np.ndarray[Any, Any], int]:
    """Return ``BOS ids EOS`` of the texts of a split, ``(N, L)`` int32, and how many are cut.

    The ids are padded to L and cached on disk.

    Args:
        split: The split that the texts belong to.
        texts: One text per pair.
        tokenizer: Encoder of the texts.
        context_length: L.
        kind: Name of the texts in the cache.
    """

    def compute() -> np.ndarray[Any, Any]:
        segments = [tokenizer.encode_segment(text, context_length) for text in texts]
        rows = [torch.cat([segment.ids, torch.tensor([segment.num_cut])]) for segment in segments]
        return torch.stack(rows).int().numpy()

    parts = {"kind": kind, "data": split.digest, "tokenizer": tokenizer.digest}
    # The last column has the number of ids that were cut off.
    rows = cached_array(
        split.cache, parts={**parts, "context_length": str(context_length)}, compute=compute
    )
    return rows[:, :-1], int((rows[:, -1] > 0).sum())


def caption_ids(captions: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return a number for each caption, ``(N,)`` int64.

    Numbers are equal where captions are equal after ``normalize_unicode``.

    >>> caption_ids(["Синий круг", "красный круг", " синий круг"]).tolist()
    [1, 0, 1]
    """
    normalized = [normalize_unicode(caption) for caption in captions]
    return np.unique(normalized, return_inverse=True)[1].astype(np.int64)
