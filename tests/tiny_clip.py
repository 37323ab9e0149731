"""The smallest CLIP, with the scenes and sentences that it learns from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rudolph.data.datasets.shapes import ShapesConfig
from rudolph.data.splits import DataConfig, Split
from rudolph.models.vision.clip import CLIPConfig
from rudolph.sequence.tokenizer import Tokenizer

SIDE, NUM_PAIRS = 24, 70


def scenes(folder: Path) -> tuple[Split, Tokenizer]:
    """Return a split with some repeated sentences, and its tokenizer."""
    shapes = ShapesConfig(families=("one", "count"), num_train=NUM_PAIRS)
    split = Split(DataConfig(dataset="shapes", image_size=SIDE, shapes=shapes), "train", folder)
    return split, Tokenizer.train(split.captions, vocab_size=200, path=folder / "bpe.model")


def config_for(tokenizer: Tokenizer, **changes: Any) -> CLIPConfig:
    config = CLIPConfig(
        embed_dim=24,
        image_resolution=SIDE,
        vision_layers=2,
        vision_width=32,
        vision_patch_size=8,
        context_length=16,
        vocab_size=tokenizer.vocab_size,
        transformer_width=32,
        transformer_heads=2,
        transformer_layers=2,
    )
    return replace(config, **changes)
