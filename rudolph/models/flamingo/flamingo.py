"""Flamingo: a language model that attends to images and videos between its blocks.

``images -> vision -> resampler -> latents``, then
``text -> embed -> (gated cross-attention to latents, block) x L -> logits``

- A *media* is an image or a video.  In a text, each media is represented by the token
  ``media_token_id`` (a *tag*).  ``fusion/media_mask.py`` has the rules by which a position attends
  to media.
- The gates start at 0, so a new Flamingo returns the logits of its language model.

``Flamingo.trained_choices`` lists which parts can be trained together.

Source: Alayrac 2022 (arXiv:2204.14198); flamingo-pytorch 0.1.2; open_flamingo 2.0.1.

Shapes: B batch, T text positions, M media per row, F frames, C x H x W pixels, P features per
image, R latents per media, E vision width, D text width, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from rudolph.files.constraints import Count, check
from rudolph.models.fusion.cross_attention import (
    CrossAttentionConfig,
    GatedCrossAttentionBlock,
    KeysValues,
)
from rudolph.models.fusion.media_mask import (
    MEDIA_RULES,
    TagCounts,
    check_tags,
    count_tags,
    media_mask,
    number_media,
)
from rudolph.models.fusion.resampler import PerceiverResampler, ResamplerConfig
from rudolph.models.layers.partly_trained import PartlyTrained
from rudolph.models.lm.decode import at_last_token, decode_tokens
from rudolph.models.lm.language_model import (
    LanguageModel,
    LanguageModelCache,
    LanguageModelConfig,
)


@dataclass(frozen=True)
class FlamingoConfig:
    """Architecture of a Flamingo.

    Attributes:
        language_model: The language model.
        resampler: The Perceiver resampler.
        cross_attention: The gated cross-attention.
        every: Distance between blocks with a gated cross-attention.
        offset: First block with a gated cross-attention.
        place: Whether the cross-attention comes ``before`` or ``after`` its block.
        attend_to: A rule in ``MEDIA_RULES``.
        media_token_id: Id of a media tag.
        document_end_id: Id of the token that ends a document.  Later tokens attend to no media
            until the next tag.  None if each row is one document.
    """

    language_model: LanguageModelConfig
    resampler: ResamplerConfig
    cross_attention: CrossAttentionConfig
    every: Count = 4
    offset: int = 0
    place: Literal["before", "after"] = "before"
    attend_to: str = "immediate"
    media_token_id: int = 3
    document_end_id: int | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        num_layers, vocab_size = self.language_model.num_layers, self.language_model.vocab_size
        check(self)
        if not 0 <= self.offset < num_layers:
            raise ValueError(f"offset must lie in [0, {num_layers}), got {self.offset}")
        if self.attend_to not in MEDIA_RULES:
            raise ValueError(
                f"attend_to must be one of {', '.join(MEDIA_RULES)}, got {self.attend_to!r}"
            )
        if not 0 <= self.media_token_id < vocab_size:
            raise ValueError(
                f"media_token_id must lie in [0, {vocab_size}), got {self.media_token_id}"
            )

    @property
    def cross_layers(self) -> range:
        """Return the indices of the blocks that have a gated cross-attention."""
        return range(self.offset, self.language_model.num_layers, self.every)


class MediaMemory(NamedTuple):
    """Keys and values of all media, computed once per image.

    Attributes:
        keys_values: Keys and values of each of ``cross_layers``.
        numbers: Media numbers ``(B, M)``, 0 for absent media.
        num_latents: Latents per media, R.
    """

    keys_values: dict[int, KeysValues]
    numbers: Tensor
    num_latents: int

    def repeat(self, number: int) -> "MediaMemory":
        """Return the memory with every row repeated ``number`` times; copies are adjacent."""
        keys_values = {
            layer: (key.repeat_interleave(number, 0), value.repeat_interleave(number, 0))
            for layer, (key, value) in self.keys_values.items()
        }
        return MediaMemory(
            keys_values, self.numbers.repeat_interleave(number, 0), self.num_latents
        )


class FlamingoCache:
    """State of cached decoding: the language model's cache and the tag counts so far."""

    def __init__(self, text: LanguageModelCache) -> None:
        self.text = text
        self.counts: TagCounts | None = None

    def repeat(self, number: int) -> "FlamingoCache":
        """Return a cache with every row repeated ``number`` times; copies are adjacent."""
        copy = FlamingoCache(self.text.repeat(number))
        if self.counts is not None:
            copy.counts = TagCounts(*(part.repeat_interleave(number, 0) for part in self.counts))
        return copy


class Flamingo(PartlyTrained):
    """``model(text, images) -> logits``.

    Args:
        config: The language model, the resampler and the cross-attention.
        vision: Maps images ``(B, C, H, W)`` to features ``(B, P, E)``, where E is the
            resampler's width.  None for a model that only reads features.
    """

    # The paper freezes the vision encoder and the language model and trains the fusion parts.
    # flamingo-pytorch trains all parts without images, and the fusion parts with images.
    trained_choices: ClassVar = {
        "all": ("vision", "language_model", "resampler", "cross_blocks"),
        "without_vision": ("language_model", "resampler", "cross_blocks"),
        "language_model": ("language_model",),
        "fusion": ("resampler", "cross_blocks"),
    }

    def __init__(self, config: FlamingoConfig, vision: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.language_model = LanguageModel(config.language_model)
        self.resampler = PerceiverResampler(config.resampler)
        widths = config.language_model.hidden_size, config.resampler.width
        self.cross_blocks = nn.ModuleDict(
            {
                str(layer): GatedCrossAttentionBlock(*widths, config.cross_attention)
                for layer in config.cross_layers
            }
        )

    def forward(
        self,
        text: Tensor,
        images: Tensor | None = None,
        videos: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        media_present: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``(B, T, V)``; without media, those of the language model.

        Args:
            text: Token ids ``(B, T)``.
            images: ``(B, M, C, H, W)``; None for videos or text only.
            videos: ``(B, M, F, C, H, W)``; None for images or text only.
            attention_mask: ``(B, T)``, nonzero at tokens and 0 at padding on either side.
            media_present: ``(B, M)`` bool, false for absent media; None if all are present.

        Raises:
            ValueError: If a text has more tags than media.
        """
        memory = self.memory(self.latents(images, videos), media_present)
        return self.language_model.logits(self.hidden(text, memory, attention_mask))

    def latents(self, images: Tensor | None, videos: Tensor | None) -> Tensor | None:
        """Return the latents ``(B, M, R, E)`` of images or videos, or None if neither is given.

        Pass precomputed features to ``model.resampler`` instead.

        Raises:
            ValueError: If both are given, a shape is wrong, or the vision encoder is missing or
                returns no feature per patch.
        """
        if images is not None and videos is not None:
            raise ValueError("expected images or videos, got both")
        pixels = images if videos is None else videos
        if pixels is None:
            return None
        expected = "(B, M, C, H, W)" if videos is None else "(B, M, F, C, H, W)"
        if pixels.dim() != expected.count(",") + 1:
            name = "images" if videos is None else "videos"
            raise ValueError(f"{name} must be {expected}, got {tuple(pixels.shape)}")
        if pixels.shape[1] < 1:
            raise ValueError(
                "expected at least one media per row, got 0; for text alone pass none"
            )
        if self.vision is None:
            raise ValueError("the model has no vision encoder to read images with")
        features = self.vision(pixels.flatten(0, -4))
        width = self.config.resampler.width
        if features.dim() != 3 or features.shape[-1] != width:
            raise ValueError(
                f"the vision encoder must return (B, P, {width}), one feature per patch, "
                f"got {tuple(features.shape)}"
            )
        return self.resampler(features.view(*pixels.shape[:-3], *features.shape[1:]))

    def memory(
        self, latents: Tensor | None, media_present: Tensor | None = None
    ) -> MediaMemory | None:
        """Compute the keys and values that texts attend to.

        Args:
            latents: ``(B, M, R, E)``; None for text only.
            media_present: ``(B, M)`` bool; None if all are present.

        Raises:
            ValueError: If ``media_present`` has another shape.
        """
        if latents is None:
            return None
        batch, num_media, num_latents, _ = latents.shape
        if media_present is None:
            media_present = latents.new_ones(batch, num_media, dtype=torch.bool)
        if media_present.shape != (batch, num_media):
            raise ValueError(
                f"media_present must be {(batch, num_media)}, got {tuple(media_present.shape)}"
            )
        media = latents.flatten(1, 2)
        keys_values = {
            layer: self.cross_block(layer).attn.keys_values(media)
            for layer in self.config.cross_layers
        }
        return MediaMemory(keys_values, number_media(media_present), num_latents)

    def hidden(
        self,
        text: Tensor,
        memory: MediaMemory | None,
        attention_mask: Tensor | None = None,
        cache: FlamingoCache | None = None,
    ) -> Tensor:
        """Return the last block's output ``(B, T, D)``.

        Args:
            text: Token ids ``(B, T)``; with a cache, only the new positions.
            memory: Result of ``memory``; None leaves the cross-attention out.
            attention_mask: ``(B, T)``, nonzero at tokens and 0 at padding; None for no padding.
            cache: State of cached decoding, extended by the new positions.
        """
        x = self.language_model.embed_tokens(text)
        text_cache = None if cache is None else cache.text
        context = self.language_model.context(x, attention_mask, text_cache)
        mask = None
        if memory is not None:
            mask = self.latent_mask(text, memory, attention_mask, cache)
        for layer, block in enumerate(self.language_model.layers):
            if self.config.place == "before":
                x = self.attend_to_media(layer, x, memory, mask)
            x = block(x, context)
            if self.config.place == "after":
                x = self.attend_to_media(layer, x, memory, mask)
        return x

    def attend_to_media(
        self, layer: int, x: Tensor, memory: MediaMemory | None, mask: Tensor | None
    ) -> Tensor:
        """Apply the block's gated cross-attention if it has one; otherwise return ``x``."""
        if memory is None or layer not in memory.keys_values:
            return x
        return self.cross_block(layer)(x, memory.keys_values[layer], mask)

    def cross_block(self, layer: int) -> GatedCrossAttentionBlock:
        """Return the gated cross-attention of a block in ``cross_layers``."""
        return cast(GatedCrossAttentionBlock, self.cross_blocks[str(layer)])

    def latent_mask(
        self,
        text: Tensor,
        memory: MediaMemory,
        attention_mask: Tensor | None,
        cache: FlamingoCache | None,
    ) -> Tensor:
        """Return the mask ``(B, T, M * R)`` bool, true where a position may attend to a latent.

        Raises:
            ValueError: If a text has more tags than media, or the batch sizes differ.
        """
        if len(memory.numbers) != len(text):
            raise ValueError(f"expected media of {len(text)} rows, got {len(memory.numbers)}")
        is_tag, is_end = text == self.config.media_token_id, None
        if self.config.document_end_id is not None:
            is_end = text == self.config.document_end_id
        if attention_mask is not None:
            # Padding may have the id of the end token.
            is_tag = is_tag & attention_mask.bool()
            is_end = None if is_end is None else is_end & attention_mask.bool()
        counts = count_tags(is_tag, is_end, None if cache is None else cache.counts)
        check_tags(counts, memory.numbers)
        if cache is not None:
            cache.counts = counts
        mask = media_mask(self.config.attend_to, counts, memory.numbers)
        return mask.repeat_interleave(memory.num_latents, dim=-1)

    @torch.no_grad()
    def generate_greedily(
        self,
        text: Tensor,
        memory: MediaMemory | None,
        *,
        num_tokens: int,
        attention_mask: Tensor | None = None,
        end_id: int | None = None,
    ) -> Tensor:
        """Continue prompts greedily; return the new tokens ``(B, S)``, see ``decode_tokens``.

        A media tag is never generated, since no media would belong to it.

        Args:
            text: Prompts ``(B, T)``, padded on either side.
            memory: Result of ``model.memory(model.latents(images, videos))``.
            num_tokens: Maximum number of new tokens.
            attention_mask: ``(B, T)``, nonzero at tokens and 0 at padding; None for no padding.
            end_id: Id that ends a row; None always generates ``num_tokens`` tokens.
        """
        model = self.language_model
        num_positions = text.shape[1] + num_tokens
        cache = FlamingoCache(model.new_cache(len(text), num_positions=num_positions))

        def logits_after(hidden: Tensor) -> Tensor:
            logits = model.logits(hidden)
            logits[:, self.config.media_token_id] = -torch.inf
            return logits

        hidden = self.hidden(text, memory, attention_mask, cache)
        return decode_tokens(
            logits_after(at_last_token(hidden, attention_mask)),
            lambda token: logits_after(self.hidden(token, memory, cache=cache)[:, -1]),
            num_tokens=num_tokens,
            end_id=end_id,
        )
