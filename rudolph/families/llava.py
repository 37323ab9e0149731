"""LLaVA: a connector inserts image vectors among the word embeddings of a language model.

Its settings also give early fusion as in RUDOLPH, with VQ codes as image tokens.  In late fusion,
one vector, computed from image and question, is the only image token.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rudolph.data.documents import DocumentBatch, DocumentFormat
from rudolph.families.documents import EmbeddingReader
from rudolph.families.interface import RunSettings
from rudolph.families.vision_language import (
    VisionLanguageFamily,
    VisionLanguageSection,
    build_vision,
    encoder_pixels,
)
from rudolph.files.constraints import Count, errors_under
from rudolph.models.fusion.connectors import ConnectorConfig, ConnectorShape, build_connector
from rudolph.models.fusion.late_fusion import FusionConfig, build_fusion
from rudolph.models.llava.late_fusion import LateFusionLLaVA
from rudolph.models.llava.llava import ImageTokenConfig, LLaVA
from rudolph.models.lm.language_model import LanguageModel, LanguageModelConfig
from rudolph.models.weights import meta_device
from rudolph.sequence.conversation import IGNORE


@dataclass(frozen=True)
class LateFusion:
    """How the image and the question become one vector; see ``models/fusion/late_fusion.py``.

    Attributes:
        kind: A name in ``FUSIONS``; null for early fusion, which keeps the connector's vectors.
        rank: Rank of ``low_rank``.
        hidden: Hidden channels of ``concat``.
        gate: Kind of the gates of ``gated``.
        gate_size: One gate per modality, or one per modality and channel.
    """

    kind: str | None = None
    rank: Count = 128
    hidden: Count = 128
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    gate_size: Literal["scalar", "vector"] = "vector"

    def fusion(self, width: int) -> FusionConfig:
        """Return the fusion of two vectors of ``width`` channels into one."""
        settings: dict[str, Any] = asdict(self)
        return FusionConfig(width=width, widths=(width, width), **settings)


@dataclass(frozen=True)
class LLaVASection(VisionLanguageSection):
    """The ``model`` section of family ``llava``.

    Attributes:
        trained: ``connector`` trains only the connector and the late fusion (LLaVA's first stage);
            ``without_vision`` also trains the language model (LLaVA's second stage); ``all``
            trains everything.
        connector: The connector; late fusion needs one that returns one vector per image.
        late_fusion: Fusion of each image vector with its question.
        image_attention: Whether the vectors of an image attend to each other in both directions
            (``bidirectional``) or only backwards (``causal``).
    """

    family: Literal["llava"] = "llava"
    trained: Literal["connector", "without_vision", "all"] = "connector"
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    late_fusion: LateFusion = field(default_factory=LateFusion)
    image_attention: Literal["causal", "bidirectional"] = "causal"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        super().__post_init__()
        embeds, reads_codes = self.connector.kind in ("table", "blank"), "codes" in self.encoders
        if reads_codes and not embeds:
            raise ValueError(
                f"connector.kind: expected table for encoder codes, got {self.connector.kind}"
            )
        if self.connector.kind == "table" and not reads_codes:
            raise ValueError(
                f"connector.kind: table needs encoder codes, got encoders {list(self.encoders)}"
            )
        if self.late_fusion.kind is not None and self.scores_questions:
            raise ValueError("scores_questions: expected false with late_fusion, got true")
        if self.late_fusion.kind is not None and self.question_first:
            raise ValueError("question_first: expected false with late_fusion, got true")

    @property
    def trains_language_model(self) -> bool:
        """Return whether the weights of the language model are trained."""
        return self.trained != "connector"


class LLaVAFamily(VisionLanguageFamily):
    """LLaVA as a ``families.interface.Family``."""

    config = LLaVASection
    stage = "llava"

    def document_format(self, run: RunSettings) -> DocumentFormat:
        """Return how the model reads documents: with one token per image vector."""
        with meta_device():
            number = self.empty(run).num_view_tokens
        return replace(super().document_format(run), num_image_tokens=number)

    def empty(self, run: RunSettings) -> LLaVA:
        """Construct the model without a seed, for example to count weights on the meta device."""
        section, vision = run.model, build_vision(run)
        width = section.language_model.hidden_size
        shape = ConnectorShape(vision.width, width, vision.grid)
        with errors_under("connector"):
            connector = build_connector(section.connector, shape)
        language_model = LanguageModel(section.language_model)
        # The image token follows the BPE ids.
        images = ImageTokenConfig(section.language_model.vocab_size - 1, vision.image_size)
        if section.late_fusion.kind is None:
            return LLaVA(vision, connector, language_model, images)
        with errors_under("late_fusion"):
            fusion = build_fusion(section.late_fusion.fusion(width))
        return LateFusionLLaVA(vision, connector, language_model, images, fusion)

    def reader(self, run: RunSettings, model: LLaVA) -> EmbeddingReader:
        """Return the reader of a model."""

        def embed(documents: DocumentBatch) -> Tensor:
            pixels: Any = None
            if documents.images is not None:
                # Images of a batch in the order of their rows, without padding.
                shown = documents.images[documents.present]
                pixels = encoder_pixels(shown, model.images.image_size)
            if isinstance(model, LateFusionLLaVA):
                owners = image_of_question(documents, model.images.token_id)
                return model.embed_fused(documents.input_ids, pixels, owners)
            return model.embed(documents.input_ids, pixels)

        def spans(documents: DocumentBatch) -> Tensor:
            return image_spans(documents.input_ids, model.images.token_id, model.num_view_tokens)

        is_causal = run.model.image_attention == "causal"
        return EmbeddingReader(model.language_model, embed, None if is_causal else spans)


def image_spans(input_ids: Tensor, image_token_id: int, num_tokens: int) -> Tensor:
    """Return the image number of each image token, counted from 1 per row; 0 at other tokens.

    >>> image_spans(torch.tensor([[5, 9, 9, 9, 9, 6]]), 9, 2).tolist()
    [[0, 1, 1, 2, 2, 0]]
    """
    is_image = input_ids == image_token_id
    return torch.where(is_image, (is_image.cumsum(1) - 1) // num_tokens + 1, 0)


def image_of_question(documents: DocumentBatch, image_token_id: int) -> Tensor:
    """Return the number ``(B, T)``, int64, of the image that each question token follows.

    Images are numbered from 0 in the order of the rows; each image has one token.  All tokens
    outside questions, such as those of answers, have -1.
    """
    is_image = documents.input_ids == image_token_id
    numbers = is_image.flatten().cumsum(0).view_as(is_image) - 1
    is_question = documents.attention_mask.bool() & ~is_image & (documents.labels == IGNORE)
    has_image = is_image.cumsum(1) > 0
    return torch.where(is_question & has_image, numbers, -1)
