"""Published sizes of Flamingo, keyed by name.

Fusion parts have the published geometry.  Language models consist of LLaMA blocks with the
published depth and width; each SwiGLU has as many parameters as the published MLP.  Vocabulary
sizes match the published ones only in order of magnitude, since the tokenizers differ.

Source: Alayrac 2022 (arXiv:2204.14198), tables 1 and 5; open_flamingo 2.0.1, ``src/factory.py``.
"""

from rudolph.models.flamingo.flamingo import FlamingoConfig
from rudolph.models.fusion.cross_attention import CrossAttentionConfig
from rudolph.models.fusion.resampler import ResamplerConfig
from rudolph.models.lm.language_model import LanguageModelConfig

HEAD_SIZE = 128


def llama_size(
    *, vocab_size: int, num_layers: int, num_heads: int, mlp_size: int
) -> LanguageModelConfig:
    """Return a config with 128 channels per head and one key-value head per query head."""
    return LanguageModelConfig(
        vocab_size=vocab_size,
        hidden_size=HEAD_SIZE * num_heads,
        num_layers=num_layers,
        num_heads=num_heads,
        num_key_value_heads=num_heads,
        mlp_size=mlp_size,
    )


def flamingo_size(*, num_layers: int, num_heads: int, mlp_size: int, every: int) -> FlamingoConfig:
    """Return a config of the paper, with cross-attention at multiples of ``every``."""
    return FlamingoConfig(
        language_model=llama_size(
            vocab_size=32_000, num_layers=num_layers, num_heads=num_heads, mlp_size=mlp_size
        ),
        resampler=ResamplerConfig(width=1536, num_heads=16, head_size=96, num_frame_embeddings=8),
        cross_attention=CrossAttentionConfig(num_heads=num_heads, head_size=HEAD_SIZE),
        every=every,
    )


def open_flamingo_size(
    *, num_layers: int, num_heads: int, mlp_size: int, every: int
) -> FlamingoConfig:
    """Return a config of OpenFlamingo for CLIP ViT-L/14 features.

    The last block in each group of ``every`` blocks attends to media.
    """
    return FlamingoConfig(
        language_model=llama_size(
            vocab_size=50_432, num_layers=num_layers, num_heads=num_heads, mlp_size=mlp_size
        ),
        resampler=ResamplerConfig(),
        cross_attention=CrossAttentionConfig(),
        every=every,
        offset=every - 1,
    )


FLAMINGO_SIZES: dict[str, FlamingoConfig] = {
    "flamingo_3b": flamingo_size(num_layers=24, num_heads=16, mlp_size=5504, every=1),
    "flamingo_9b": flamingo_size(num_layers=40, num_heads=32, mlp_size=11_008, every=4),
    "flamingo_80b": flamingo_size(num_layers=80, num_heads=64, mlp_size=22_016, every=7),
    "open_flamingo_3b": open_flamingo_size(num_layers=24, num_heads=16, mlp_size=5504, every=1),
    "open_flamingo_9b": open_flamingo_size(num_layers=32, num_heads=32, mlp_size=11_008, every=4),
}
