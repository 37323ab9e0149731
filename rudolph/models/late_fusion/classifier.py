"""A classifier of answers: two encoders, the fusion of their vectors, and a linear layer.

``image -> image tower -> x_1``, ``question -> text tower -> x_2``, and
``logits = W fusion([P_1 x_1, P_2 x_2]) + b``, one logit per answer.  The modalities meet after
their encoders alone.  ``P_i`` is the identity unless the fusion expects another width.

Each ``x_i`` is normalised to mean 0 and variance 1 first.  Otherwise the fusion would compare the
scale of a trained encoder with that of a new one.

Source: Antol 2015 (arXiv:1505.00468) for classes of frequent answers; Fukui 2016
(arXiv:1606.01847) for the comparison of fusions in front of them.

Shapes: B examples, L question tokens, S pixels per side, E encoder channels, D channels of the
fused vector, K answers.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.models.fusion.late_fusion import NEED_ALL, FusionConfig, build_fusion, zero_missing
from rudolph.models.layers.partly_trained import PartlyTrained
from rudolph.models.vision.clip import CLIPConfig, TextTransformer, VisionTransformer
from rudolph.sequence.texts import shorten

# Longest answer in bytes of UTF-8; the table of answers has a fixed shape.
MAX_ANSWER_BYTES = 128


class AnswerClassifier(PartlyTrained):
    """A late fusion of image and question that scores K answers.

    A missing modality has no effect.  Fusions that cannot leave one out read a vector of zeros
    instead, which is the mean of the normalised vectors.

    Args:
        towers: Shapes of both.
        fusion: The fusion of the image vector with the question vector, in this order.
        num_answers: K.
    """

    trained_choices: ClassVar = {
        "all": ("vision", "text", "project", "fusion", "to_logits"),
        "without_vision": ("text", "project", "fusion", "to_logits"),
        "fusion": ("project", "fusion", "to_logits"),
    }
    answer_bytes: Tensor

    def __init__(self, towers: CLIPConfig, fusion: FusionConfig, num_answers: int) -> None:
        super().__init__()
        width = towers.embed_dim
        self.vision = VisionTransformer(towers)
        self.text = TextTransformer(towers)
        self.project = nn.ModuleList(
            nn.Identity() if expected == width else nn.Linear(width, expected)
            for expected in fusion.widths
        )
        self.fusion = build_fusion(fusion)
        self.needs_all = fusion.kind in NEED_ALL
        self.to_logits = nn.Linear(fusion.width, num_answers)
        # A buffer, so that the weights never lie apart from the meaning of their classes.
        table = torch.zeros(num_answers, MAX_ANSWER_BYTES, dtype=torch.uint8)
        self.register_buffer("answer_bytes", table)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, present: Tensor | None = None
    ) -> Tensor:
        """Return the logits of all answers, ``(B, K)``.

        Args:
            pixel_values: Normalised images ``(B, 3, S, S)``.
            input_ids: Questions ``(B, L)``, each with an ``EOS``.
            present: ``(B, 2)`` bool, whether an example has an image, and a question; None for
                both in every example.
        """
        vectors = [self.vision(pixel_values), self.text.encode_text(input_ids)]  # (B, E) each
        return self.to_logits(self.fuse(vectors, present))

    def fuse(self, vectors: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Return the fused vectors ``(B, D)`` of image and question vectors, ``(B, E)`` each."""
        vectors = [F.layer_norm(vector, vector.shape[-1:]) for vector in vectors]
        if self.needs_all:
            vectors, present = zero_missing(vectors, present), None
        projected = [layer(vector) for layer, vector in zip(self.project, vectors, strict=True)]
        return self.fusion(projected, present)

    @property
    def answers(self) -> tuple[str, ...]:
        """Return the answer of each class; empty texts before ``set_answers``."""
        rows = self.answer_bytes.cpu().numpy()
        return tuple(row.tobytes().rstrip(b"\0").decode("utf-8") for row in rows)

    def set_answers(self, answers: Sequence[str]) -> None:
        """Store the answer of each class with the weights.

        Raises:
            ValueError: If an answer is too long.
        """
        rows = [list(answer.encode("utf-8").ljust(MAX_ANSWER_BYTES, b"\0")) for answer in answers]
        for row, answer in zip(rows, answers, strict=True):
            if len(row) > MAX_ANSWER_BYTES:
                raise ValueError(
                    f"answers: expected at most {MAX_ANSWER_BYTES} bytes each, got {len(row)} in "
                    f"{shorten(answer, 40)!r}"
                )
        self.answer_bytes.copy_(torch.tensor(rows, dtype=torch.uint8))
