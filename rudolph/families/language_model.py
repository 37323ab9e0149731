"""A language model that reads only texts: the part that vision-language families start from."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from rudolph.data.documents import DocumentBatch
from rudolph.families.documents import DocumentFamily, DocumentSection, EmbeddingReader
from rudolph.families.interface import RunSettings
from rudolph.models.lm.language_model import LanguageModel, LanguageModelConfig


@dataclass(frozen=True)
class LanguageModelSection(LanguageModelConfig, DocumentSection):
    """The ``model`` section of family ``language_model``."""

    family: Literal["language_model"] = "language_model"
    scores_questions: bool = True

    @property
    def architecture(self) -> LanguageModelConfig:
        """Return the settings that determine the shape of the language model."""
        return LanguageModelConfig(
            **{each.name: getattr(self, each.name) for each in fields(LanguageModelConfig)}
        )


class LanguageModelFamily(DocumentFamily):
    """The language model as a ``families.interface.Family``."""

    config = LanguageModelSection
    stage = "language_model"
    reads_images = False

    def language_model_config(self, section: Any) -> tuple[str, Any]:
        """Return the key and the config of the language model: the whole section."""
        return "model", section

    def empty(self, run: RunSettings) -> LanguageModel:
        """Construct the model without a seed, for example to count weights on the meta device."""
        return LanguageModel(run.model.architecture)

    def reader(self, run: RunSettings, model: LanguageModel) -> EmbeddingReader:
        """Return the reader of a model."""
        return EmbeddingReader(model, input_ids)


def input_ids(documents: DocumentBatch) -> Any:
    """Return the tokens ``(B, T)`` of documents without images.

    Raises:
        ValueError: If a document has an image.
    """
    if documents.images is not None:
        raise ValueError("expected documents without images for a language model, got images")
    return documents.input_ids
