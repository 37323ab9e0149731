"""Sizes of the check's models and inputs, at full size and for a smoke test.

The geometries equal those of ``rudolph_350m.yaml`` and ``rudolph_1.3b.yaml`` in
``experiments/base``. They are repeated here because a bare machine lacks the packages that read
configuration files; a test keeps both equal.
"""

from dataclasses import dataclass, replace

import torch

from rudolph.benchmarks.benchmark_case import BenchmarkCase
from rudolph.benchmarks.config import SpeedConfig
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.upscaler import UpscalerConfig
from rudolph.models.vqgan.model import VQGANConfig
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.sequence.layout import EOS, SequenceLayout, Vocabulary
from rudolph.training.losses import DecoderLossConfig, ReconstructionLossConfig
from rudolph.training.optim import OptimConfig

SAMPLING = TokenSamplingConfig(top_k=768, top_p=0.99)


@dataclass(frozen=True)
class Geometry:
    """A decoder's sizes and the amount of work to time.

    Attributes:
        decoder: The decoder's configuration.
        layout: The layout of its sequences.
        vocabulary: Its vocabulary.
        train_batch: Sequences per training step.
        num_tokens: Image tokens to time per image when decoding.
    """

    decoder: DecoderConfig
    layout: SequenceLayout
    vocabulary: Vocabulary
    train_batch: int
    num_tokens: int

    def model(self, device: torch.device, **changes: object) -> MaskedDecoder:
        """Return a decoder with the same random weights at every call.

        Args:
            device: The device of the weights.
            **changes: Fields of ``DecoderConfig`` to replace.
        """
        torch.manual_seed(0)
        config = replace(self.decoder, **changes)  # type: ignore[arg-type]
        with torch.device(device):
            return MaskedDecoder(config, self.layout, self.vocabulary)

    def tokens(self, batch: int, device: torch.device, *, seed: int = 0) -> torch.Tensor:
        """Return random sequences ``(B, T)`` without padding."""
        generator = torch.Generator().manual_seed(seed)
        first, last = EOS + 1, self.vocabulary.bpe_size
        parts = [
            torch.randint(low, high, (batch, length), generator=generator)
            for length, low, high in zip(
                self.layout.segment_lengths,
                (first, 0, first),
                (last, self.vocabulary.codebook_size, last),
                strict=True,
            )
        ]
        return torch.cat(parts, dim=1).to(device)


@dataclass(frozen=True)
class Sizes:
    """All sizes of a check.

    Attributes:
        is_smoke: True for the smallest sizes.
        device: The device to check.
        checked: The decoder whose results are compared; at full size it has every kind of mask
            and an uneven layout.
        decoders: The decoders whose speed is measured, keyed by name.
        decode_batches: Batch sizes of decoding.
        mask_layouts: Layouts on which block masks are checked.
        head_size: Head size in the checks of attention.
        vqgan: The VQ-GAN whose speed is measured.
        upscaler: The upscaler whose speed is measured.
        image_batch: Images per batch.
        num_repetitions: Repetitions of each measurement.
        roofline_side: Side of the square matrices whose product measures the arithmetic limit.
        roofline_bytes: Bytes that the copy reads and writes to measure the memory bandwidth.
    """

    is_smoke: bool
    device: torch.device
    checked: Geometry
    decoders: dict[str, Geometry]
    decode_batches: tuple[int, ...]
    mask_layouts: tuple[SequenceLayout, ...]
    head_size: int
    vqgan: VQGANConfig
    upscaler: UpscalerConfig
    image_batch: int
    num_repetitions: int
    roofline_side: int
    roofline_bytes: int

    def case(self, geometry: Geometry, batch: int = 1) -> BenchmarkCase:
        """Return the case from which ``benchmarks.flops`` counts operations and bytes."""
        return BenchmarkCase(
            seed=0,
            speed=SpeedConfig("decode", ("float32",), batch, geometry.num_tokens),
            decoder=geometry.decoder,
            layout=geometry.layout,
            vocabulary=geometry.vocabulary,
            vqgan=self.vqgan,
            losses=DecoderLossConfig(),
            vqgan_losses=ReconstructionLossConfig(),
            optim=OptimConfig(),
            vqgan_optim=OptimConfig(),
            sampling=SAMPLING,
        )


def rudolph_geometry(
    hidden_size: int,
    kernel: int,
    *,
    text_length: int,
    side: int,
    num_specials: int,
    train_batch: int,
    num_tokens: int,
) -> Geometry:
    """Return a published RUDOLPH with 24 layers.

    It has no dropout, because block masks do not support dropout.
    """
    decoder = DecoderConfig(
        num_layers=24,
        hidden_size=hidden_size,
        num_heads=16,
        layer_masks=("row", "column", "row", f"conv({kernel})"),
        last_layer_mask=f"conv({kernel + 2})",
        attention_dropout=0.0,
        output_dropout=0.0,
    )
    vocabulary = Vocabulary(num_text_specials=num_specials, num_left_paddings=text_length)
    layout = SequenceLayout(text_length, side, text_length)
    return Geometry(decoder, layout, vocabulary, train_batch, num_tokens)


def small_geometry(
    masks: tuple[str, ...], hidden_size: int, num_heads: int, layout: SequenceLayout
) -> Geometry:
    """Return a decoder with a small vocabulary and one layer per mask."""
    decoder = DecoderConfig(
        num_layers=len(masks),
        hidden_size=hidden_size,
        num_heads=num_heads,
        layer_masks=masks,
        last_layer_mask=None,
        attention_dropout=0.0,
        output_dropout=0.0,
        position_init_std=0.5,
    )
    vocabulary = Vocabulary(40, 8, layout.left_text_length, 32)
    return Geometry(decoder, layout, vocabulary, train_batch=4, num_tokens=8)


def full_sizes(device: torch.device) -> Sizes:
    """Return the sizes for a GPU with 80 GB."""
    masks = ("causal", "row", "row_block", "column", "conv(3)", "conv_torus(5)")
    return Sizes(
        is_smoke=False,
        device=device,
        checked=small_geometry(masks, 256, 4, SequenceLayout(13, 9, 22)),
        decoders={
            "350m": rudolph_geometry(
                1024,
                7,
                text_length=64,
                side=16,
                num_specials=384,
                train_batch=32,
                num_tokens=40,
            ),
            "1.3b": rudolph_geometry(
                2048,
                9,
                text_length=128,
                side=32,
                num_specials=2048,
                train_batch=8,
                num_tokens=40,
            ),
        },
        decode_batches=(1, 8, 64),
        mask_layouts=(SequenceLayout(64, 16, 64), SequenceLayout(13, 9, 22)),
        head_size=64,
        vqgan=VQGANConfig(),
        upscaler=UpscalerConfig(),
        image_batch=16,
        num_repetitions=5,
        roofline_side=8192,
        roofline_bytes=2**32,
    )


def smoke_sizes() -> Sizes:
    """Return sizes that take seconds on one CPU core."""
    layout = SequenceLayout(3, 3, 4)
    checked = small_geometry(("row", "column"), 32, 2, layout)
    return Sizes(
        is_smoke=True,
        device=torch.device("cpu"),
        checked=checked,
        decoders={"350m": checked, "1.3b": replace(checked, train_batch=2)},
        decode_batches=(1, 2),
        mask_layouts=(layout,),
        head_size=16,
        vqgan=VQGANConfig(
            resolution=16,
            channels=(16, 32),
            num_res_blocks=1,
            attention_resolutions=(8,),
            z_channels=16,
            norm_groups=4,
            quantizer=QuantizerConfig(num_codes=32, embedding_dim=8),
        ),
        upscaler=UpscalerConfig(num_channels=8, num_blocks=1, growth=4),
        image_batch=2,
        num_repetitions=2,
        roofline_side=64,
        roofline_bytes=2**16,
    )
