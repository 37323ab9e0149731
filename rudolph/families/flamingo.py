"""Flamingo: a language model with gated cross-attention to images between its blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from rudolph.data.documents import DocumentBatch
from rudolph.families.interface import RunSettings
from rudolph.families.vision_language import (
    VisionLanguageFamily,
    VisionLanguageSection,
    build_vision,
    encoder_pixels,
)
from rudolph.files.constraints import Count, NonNegativeInt
from rudolph.models.flamingo.flamingo import Flamingo, FlamingoCache, FlamingoConfig, MediaMemory
from rudolph.models.fusion.cross_attention import CrossAttentionConfig
from rudolph.models.fusion.resampler import ResamplerConfig
from rudolph.models.lm.decode import at_last_token
from rudolph.models.lm.language_model import LanguageModelConfig


@dataclass(frozen=True)
class FlamingoSection(VisionLanguageSection):
    """The ``model`` section of family ``flamingo``; see ``FlamingoConfig`` for the architecture.

    Attributes:
        trained: ``fusion`` trains only the resampler and the cross-attention; ``language_model``
            trains only the language model; ``without_vision`` trains all of these; ``all`` trains
            everything.
        every: Distance between blocks with a gated cross-attention.
        offset: First block with a gated cross-attention.
        place: Whether the cross-attention comes ``before`` or ``after`` its block.
        attend_to: Images that a text position attends to: ``immediate``, the image of the last tag
            before it, or ``all_previous``.
    """

    family: Literal["flamingo"] = "flamingo"
    trained: Literal["fusion", "without_vision", "language_model", "all"] = "fusion"
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    every: Count = 4
    offset: NonNegativeInt = 0
    place: Literal["before", "after"] = "before"
    attend_to: Literal["immediate", "all_previous"] = "immediate"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        super().__post_init__()
        if "codes" in self.encoders:
            raise ValueError("encoders: expected none of codes, which family llava embeds")

    @property
    def trains_language_model(self) -> bool:
        """Return whether the weights of the language model are trained."""
        return self.trained != "fusion"

    @property
    def architecture(self) -> FlamingoConfig:
        """Return the settings that determine the shape of the model."""
        return FlamingoConfig(
            self.language_model,
            self.resampler,
            self.cross_attention,
            every=self.every,
            offset=self.offset,
            place=self.place,
            attend_to=self.attend_to,
            # The image token follows the BPE ids.
            media_token_id=self.language_model.vocab_size - 1,
        )


class FlamingoState:
    """A Flamingo that has read documents; see ``DocumentState``."""

    def __init__(
        self, model: Flamingo, memory: MediaMemory | None, cache: FlamingoCache, logits: Tensor
    ) -> None:
        self.model, self.memory, self.cache, self.logits = model, memory, cache, logits

    def append(self, tokens: Tensor) -> Tensor:
        """Read tokens ``(B, S)`` and return the logits ``(B, S, V)`` after each token."""
        hidden = self.model.hidden(tokens, self.memory, cache=self.cache)
        return self.model.language_model.logits(hidden)

    def repeat(self, number: int) -> "FlamingoState":
        """Return the state with every document repeated ``number`` times; copies are adjacent."""
        memory = None if self.memory is None else self.memory.repeat(number)
        logits = self.logits.repeat_interleave(number, 0)
        return FlamingoState(self.model, memory, self.cache.repeat(number), logits)


class FlamingoReader:
    """A Flamingo as a ``DocumentReader``; one tag (image token) in the text marks each image."""

    def __init__(self, model: Flamingo) -> None:
        self.model = model

    def memory(self, documents: DocumentBatch) -> MediaMemory | None:
        """Return the keys and values of all images."""
        if documents.images is None:
            return None
        encoder: Any = self.model.vision
        pixels = encoder_pixels(documents.images, encoder.image_size)
        present = documents.present
        assert present is not None
        if bool(present.all()) or self.model.resampler.media_pos_emb is not None:
            return self.model.memory(self.model.latents(pixels, None), present)
        # Most documents have one image; encoding the padding too would be most of the work.
        shown = self.model.latents(pixels[present][None], None)
        assert shown is not None
        latents = shown.new_zeros(*present.shape, *shown.shape[2:])
        latents[present] = shown[0]
        return self.model.memory(latents, present)

    def logits(self, documents: DocumentBatch) -> Tensor:
        """Return the logits ``(B, T, V)`` of all positions."""
        memory = self.memory(documents)
        hidden = self.model.hidden(documents.input_ids, memory, documents.attention_mask)
        return self.model.language_model.logits(hidden)

    def read(self, documents: DocumentBatch, *, num_new: int) -> FlamingoState:
        """Read documents and return a state with room for ``num_new`` more tokens."""
        size, length = documents.input_ids.shape
        text = self.model.language_model.new_cache(size, num_positions=length + num_new)
        memory, cache = self.memory(documents), FlamingoCache(text)
        mask = documents.attention_mask
        hidden = self.model.hidden(documents.input_ids, memory, mask, cache)
        logits = self.model.language_model.logits(at_last_token(hidden, mask))
        return FlamingoState(self.model, memory, cache, logits)


class FlamingoFamily(VisionLanguageFamily):
    """Flamingo as a ``families.interface.Family``."""

    config = FlamingoSection
    stage = "flamingo"

    def empty(self, run: RunSettings) -> Flamingo:
        """Construct the model without a seed, for example to count weights on the meta device."""
        vision, width = build_vision(run), run.model.resampler.width
        if vision.width != width:
            raise ValueError(
                f"resampler.width: expected {vision.width}, the channels of the encoders, "
                f"got {width}"
            )
        return Flamingo(run.model.architecture, vision)

    def reader(self, run: RunSettings, model: Flamingo) -> FlamingoReader:
        """Return the reader of a model."""
        return FlamingoReader(model)

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield the names of the logged curves, including those of the gates."""
        yield from super().curve_names(run)
        yield from ("train/attn_gate", "train/ff_gate")
