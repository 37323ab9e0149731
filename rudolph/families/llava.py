"""LLaVA: image vectors of a connector among the word embeddings of a language model."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rudolph.data.documents import DocumentBatch, DocumentFormat
from rudolph.families.documents import (
    EmbeddingReader,
    VisionLanguageFamily,
    VisionLanguageSection,
    encoder_pixels,
)
from rudolph.families.interface import RunSettings
from rudolph.models.fusion.connectors import ConnectorConfig, ConnectorShape, build_connector
from rudolph.models.llava.llava import ImageTokenConfig, LLaVA
from rudolph.models.lm.language_model import LanguageModel, LanguageModelConfig
from rudolph.models.vision.clip import VisionConfig, VisionEncoder
from rudolph.models.vision.features import FeatureConfig, ViTFeatures


@dataclass(frozen=True)
class LLaVASection(VisionLanguageSection):
    """The ``model`` section of family ``llava``.

    Attributes:
        trained: ``connector`` trains the connector alone (LLaVA's first stage),
            ``without_vision`` the language model too (its second stage), ``all`` everything.
        features: Hidden states of the vision encoder that the connector reads.
    """

    family: Literal["llava"] = "llava"
    trained: Literal["connector", "without_vision", "all"] = "connector"
    vision: VisionConfig = field(default_factory=VisionConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)

    @property
    def trains_on_texts(self) -> bool:
        """Return whether a document without images changes any weight in training."""
        return self.trained != "connector"


class LLaVAFamily(VisionLanguageFamily):
    """LLaVA as a ``families.interface.Family``."""

    config = LLaVASection
    stage = "llava"

    def document_format(self, run: RunSettings) -> DocumentFormat:
        """Return how the model reads documents: a token for every image vector."""
        with torch.device("meta"):
            number = self.empty(run).num_view_tokens
        return replace(super().document_format(run), num_image_tokens=number)

    def empty(self, run: RunSettings) -> LLaVA:
        """Construct the model without a seed, as for counting on the meta device."""
        section = run.model
        vision = ViTFeatures(VisionEncoder(section.vision), section.features)
        shape = ConnectorShape(vision.width, section.language_model.hidden_size, vision.grid)
        return LLaVA(
            vision,
            build_connector(section.connector, shape),
            LanguageModel(section.language_model),
            # The image token follows the BPE ids.
            ImageTokenConfig(section.language_model.vocab_size - 1, section.vision.image_size),
        )

    def reader(self, model: LLaVA) -> EmbeddingReader:
        """Return the reader of a model."""

        def embed(documents: DocumentBatch) -> Tensor:
            pixels: Any = None
            if documents.images is not None:
                # Images of a batch in the order of their rows, without padding.
                shown = documents.images[documents.present]
                pixels = encoder_pixels(shown, model.images.image_size)
            return model.embed(documents.input_ids, pixels)

        return EmbeddingReader(model.language_model, embed)
