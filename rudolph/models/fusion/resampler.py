"""Perceiver resampler: maps any number of features per media to a fixed number of latents.

Learnt latents attend to the features and to themselves; features are never updated.

Module names are those that flamingo-pytorch and OpenFlamingo share.

Source: Alayrac 2022 (arXiv:2204.14198), section 2.1.1 and appendix A.1.1; flamingo-pytorch,
``flamingo_pytorch.py``; open_flamingo, ``src/helpers.py``; Idefics2, ``modeling_idefics2.py``, for
the mask.

Shapes: B batch, M media per row, F frames, P features per image, R latents, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rudolph.files.constraints import Count, check
from rudolph.models.layers.feed_forward import feed_forward
from rudolph.models.layers.multi_head import multi_head_attention, split_heads


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a Perceiver resampler.

    Attributes:
        width: Channels of the features and of the latents, D.
        num_layers: Layers.
        num_latents: Latents per media, R.
        num_heads: Attention heads.
        head_size: Channels per head.
        mlp_ratio: Ratio of the MLP's inner width to ``width``.
        num_media_embeddings: Maximum media per row, each with a learnt position embedding; None
            for no such embeddings.
        num_frame_embeddings: Maximum frames per video, each with a learnt position embedding; None
            for no such embeddings.
    """

    width: Count = 1024
    num_layers: Count = 6
    num_latents: Count = 64
    num_heads: Count = 8
    head_size: Count = 64
    mlp_ratio: Count = 4
    num_media_embeddings: Count | None = None
    num_frame_embeddings: Count | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)


class ResamplerAttention(nn.Module):
    """Attention of latents to features and latents, both projected by the same weights."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner_size = config.num_heads * config.head_size
        self.norm_media = nn.LayerNorm(config.width)
        self.norm_latents = nn.LayerNorm(config.width)
        self.to_q = nn.Linear(config.width, inner_size, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * inner_size, bias=False)
        self.to_out = nn.Linear(inner_size, config.width, bias=False)

    def forward(self, features: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Map latents ``(B, R, D)``, given features ``(B, P, D)`` and a mask ``(B, R, P + R)``."""
        latents = self.norm_latents(latents)
        inputs = torch.cat([self.norm_media(features), latents], dim=1)
        query = split_heads(self.to_q(latents), self.num_heads)
        key, value = (split_heads(x, self.num_heads) for x in self.to_kv(inputs).chunk(2, dim=-1))
        return self.to_out(multi_head_attention(query, key, value, mask))


class ResamplerLayer(nn.ModuleList):
    """Attention and MLP on latents, each with a residual."""

    def __init__(self, config: ResamplerConfig) -> None:
        mlp = feed_forward(config.width, config.mlp_ratio)
        super().__init__([ResamplerAttention(config), mlp])

    def forward(self, features: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Update latents ``(B, R, D)``, given features ``(B, P, D)``."""
        attention, mlp = self
        latents = latents + attention(features, latents, mask)
        return latents + mlp(latents)


class PerceiverResampler(nn.Module):
    """A resampler from the features of each media to ``num_latents`` vectors of equal width."""

    media_pos_emb: nn.Parameter | None
    frame_embs: nn.Parameter | None
    undecayed = ("latents", "media_pos_emb", "frame_embs")

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.latents = nn.Parameter(torch.randn(config.num_latents, width))
        num_media, num_frames = config.num_media_embeddings, config.num_frame_embeddings
        media = None if num_media is None else nn.Parameter(torch.randn(num_media, 1, width))
        frames = None if num_frames is None else nn.Parameter(torch.randn(num_frames, width))
        self.register_parameter("media_pos_emb", media)
        self.register_parameter("frame_embs", frames)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return latents ``(B, M, R, D)``; each media is processed separately.

        Args:
            features: ``(B, M, P, D)`` for images, ``(B, M, F, P, D)`` for videos.
            mask: Bool, in the shape of ``features`` without D; false at padding.  Latents attend
                to each other even if a media is all padding.

        Raises:
            ValueError: If there are more media or frames than embeddings.
        """
        batch, num_media = features.shape[:2]
        x = self._embed(features).flatten(0, 1)  # (B * M, F * P, D)
        latents = self.latents.expand(len(x), -1, -1)
        if mask is not None:
            mask = mask.reshape(len(x), 1, -1).expand(-1, latents.shape[1], -1)
            visible = mask.new_ones(1, 1, 1).expand(len(x), latents.shape[1], latents.shape[1])
            mask = torch.cat([mask, visible], dim=-1)
        for layer in self.layers:
            latents = layer(x, latents, mask)
        return self.norm(latents).view(batch, num_media, *latents.shape[1:])

    def _embed(self, features: Tensor) -> Tensor:
        """Add embeddings and join the frames: ``(B, M, F * P, D)``."""
        num_media, is_video = features.shape[1], features.dim() == 5
        if is_video and self.frame_embs is not None:
            num_frames = features.shape[2]
            if num_frames > len(self.frame_embs):
                raise ValueError(
                    f"num_frame_embeddings is {len(self.frame_embs)}, got {num_frames} frames"
                )
            features = features + self.frame_embs[:num_frames, None]
        features = features.flatten(2, -2)
        if self.media_pos_emb is None:
            return features
        if num_media > len(self.media_pos_emb):
            raise ValueError(
                f"num_media_embeddings is {len(self.media_pos_emb)}, got {num_media} media"
            )
        return features + self.media_pos_emb[:num_media]
