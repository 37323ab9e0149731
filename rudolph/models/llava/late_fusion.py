"""Late fusion in front of a language model: one vector fuses an image and its question.

``image -> vision -> connector -> x_1``, ``question -> mean of word embeddings -> x_2``, and the
language model reads ``fusion([x_1, x_2])`` in place of the image, before the question.  In early
fusion, the language model would read the image vectors themselves.

Source: Kim 2017 (arXiv:1610.04325) for answers from a fused vector; ``fusion/late_fusion.py`` for
the fusions.

Shapes: B rows, T positions, P images, S pixels per side, D channels of the language model.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from rudolph.models.llava.llava import ImageTokenConfig, LLaVA, require_image_tokens
from rudolph.models.lm.language_model import LanguageModel


class LateFusionLLaVA(LLaVA):
    """A LLaVA whose image vectors are fused with questions.

    The arguments besides ``fusion`` are those of ``LLaVA``.

    Args:
        fusion: Maps ``[image vectors, question vectors]``, ``(P, D)`` each, to ``(P, D)``.

    Raises:
        ValueError: If the connector has more than one vector per image.
    """

    # Late fusion is trained with the connector.
    trained_choices: ClassVar = {
        choice: (*parts, "fusion", "no_question")
        for choice, parts in LLaVA.trained_choices.items()
    }
    undecayed = ("no_question",)

    def __init__(
        self,
        vision: nn.Module,
        connector: nn.Module,
        language_model: LanguageModel,
        images: ImageTokenConfig,
        fusion: nn.Module,
    ) -> None:
        super().__init__(vision, connector, language_model, images)
        if self.num_view_tokens != 1:
            raise ValueError(
                "connector: expected one vector per image for late_fusion, "
                f"got {self.num_view_tokens}"
            )
        self.fusion = fusion
        # Replaces the question of an image that has none, such as an image with a caption.
        size = language_model.config.hidden_size
        self.no_question = nn.Parameter(torch.randn(size).mul_(size**-0.5))

    def embed_fused(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_of_question: Tensor
    ) -> Tensor:
        """Embed words and fused vectors as inputs ``(B, T, D)`` of the language model.

        Args:
            input_ids: ``(B, T)``, with one image token per image.
            pixel_values: Normalised images ``(P, 3, S, S)``, in the order of the rows; None for
                texts alone.
            image_of_question: ``(B, T)``, the index of the image whose question a token belongs
                to; -1 for other tokens.

        Raises:
            ValueError: If the image tokens of a row do not match its images.
        """
        is_image = input_ids == self.images.token_id
        words = self.language_model.embed_tokens(input_ids.masked_fill(is_image, 0))
        counts = [] if pixel_values is None else [1] * len(pixel_values)
        require_image_tokens(is_image.sum(1).tolist(), counts)
        if pixel_values is None:
            return words
        images = self.encode_views(pixel_values)[:, 0]
        questions = self.question_vectors(words, image_of_question, len(images))
        fused = self.fusion([images, questions])
        return words.masked_scatter(is_image[..., None], fused.to(words.dtype))

    def question_vectors(self, words: Tensor, image_of_question: Tensor, number: int) -> Tensor:
        """Return the mean word embedding ``(P, D)`` of each image's question."""
        owners = image_of_question.flatten()
        is_question = owners >= 0
        owners = owners[is_question]
        sums = words.new_zeros(number, words.shape[-1])
        sums = sums.index_add(0, owners, words.flatten(0, 1)[is_question])
        counts = torch.bincount(owners, minlength=number)[:, None]
        return torch.where(counts > 0, sums / counts.clamp(min=1), self.no_question)
