"""Benchmark cases: the sizes, random weights and inputs common to all implementations.

An implementation reads a ``BenchmarkCase`` from JSON and the files of one folder:

    decoder.safetensors, vqgan.safetensors, upscaler.safetensors
                                                random weights under our names
    reference_decoder.safetensors and so on, each with a .json
                                                the same weights as the reference loads them
    inputs.safetensors                          the tensors that ``make_inputs`` returns
    bpe.model                                   a tokenizer

Shapes: B images or sequences, T tokens, L left-text tokens, I image tokens, H and W pixels.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rudolph.benchmarks.config import REFERENCE, SpeedConfig
from rudolph.data.seeds import mixed_seed
from rudolph.files.settings import validate
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.reference import to_reference
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.upscaler import Upscaler, UpscalerConfig
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.models.weights import load_exactly, meta_device, save_weights
from rudolph.sequence.layout import BOS, EOS, SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.losses import DecoderLossConfig, ReconstructionLossConfig
from rudolph.training.optim import OptimConfig

CAPTION = "рыжий кот сидит на окне и смотрит на снег"
BENCHMARK_CAPTIONS = (
    CAPTION,
    "красный круг слева от синего квадрата",
    "зимний лес на закате",
    "лиса у реки",
)
# Image tokens after the left text in the sequence that checks our logits against the reference's.
CHECKED_TOKENS = 8
WITH_DECODER = ("decode", "train", "pipeline", "memory")
WITH_VQGAN = ("vqgan", "pipeline")


@dataclass(frozen=True)
class BenchmarkCase:
    """The part of a run's configuration that implementations need."""

    seed: int
    speed: SpeedConfig
    decoder: DecoderConfig
    layout: SequenceLayout
    vocabulary: Vocabulary
    vqgan: VQGANConfig
    losses: DecoderLossConfig
    vqgan_losses: ReconstructionLossConfig
    optim: OptimConfig
    vqgan_optim: OptimConfig
    sampling: TokenSamplingConfig

    @property
    def num_tokens(self) -> int:
        """Return the number of image tokens to sample per image."""
        num_image_tokens = self.layout.num_image_tokens
        return min(self.speed.num_tokens or num_image_tokens, num_image_tokens)

    def to_plain(self) -> dict[str, Any]:
        """Return the case as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def read_case(content: Any) -> BenchmarkCase:
    """Return the case that ``BenchmarkCase.to_plain`` serialised.

    Raises:
        ConfigError: If a setting is unknown, missing or invalid.
    """
    case: BenchmarkCase = validate(Path("case"), BenchmarkCase, content)
    return case


def prepare_case(
    case: BenchmarkCase, folder: Path
) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """Write the files of a case and run our models on its fixed inputs.

    Args:
        case: The case to prepare; its seed fixes weights and inputs.
        folder: An existing folder that receives the files listed in the module docstring.

    Returns:
        The outputs of ``expected_outputs``, and the models keyed by name (``decoder``, ``vqgan``,
        ``upscaler``), in evaluation mode.
    """
    workload, has_reference = case.speed.workload, REFERENCE in case.speed.implementations
    inputs = make_inputs(case)
    save_file(inputs, folder / "inputs.safetensors")
    models: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(case.seed, "speed"))
        if workload in WITH_DECODER:
            models["decoder"] = MaskedDecoder(case.decoder, case.layout, case.vocabulary)
        if workload in WITH_VQGAN:
            models["vqgan"] = VQGAN(case.vqgan)
        if workload == "upscaler":
            models["upscaler"] = Upscaler(UpscalerConfig())
    for name, model in models.items():
        save_weights(model.eval(), folder / f"{name}.safetensors")
        if has_reference:
            save_reference(model, folder / f"reference_{name}.safetensors")
    if workload == "pipeline":
        size = min(case.vocabulary.bpe_size, 512)
        Tokenizer.train(BENCHMARK_CAPTIONS, vocab_size=size, path=folder / "bpe.model")
    return expected_outputs(models, inputs), models


def save_reference(model: nn.Module, path: Path) -> None:
    """Write weights and constructor arguments in the format that the reference's package loads.

    The arguments go to a JSON file next to ``path``.
    """
    reference = to_reference(model)
    save_file({name: value.contiguous() for name, value in reference.state_dict.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(reference.config), "utf-8")


def make_inputs(case: BenchmarkCase) -> dict[str, Tensor]:
    """Return the random inputs of a case.

    The left text is filled up to half its length; the right text is filled completely.

    Returns:
        ``left`` (L,), ``tokens`` (B, T) and ``images`` (B, 3, H, W) in [0, 1]. ``indices`` is
        (B, positions of the VQ-GAN's latent grid). ``checked`` (1, L + ``CHECKED_TOKENS``) is the
        prefix of the first row of ``tokens``.
    """
    generator = torch.Generator().manual_seed(mixed_seed(case.seed, "speed inputs"))
    layout, size = case.layout, case.speed.batch_size
    num_text_ids = max(case.vocabulary.bpe_size, EOS + 2)

    def texts(rows: int, length: int, filled: int) -> Tensor:
        ids = torch.randint(EOS + 1, num_text_ids, (rows, length), generator=generator)
        ids[:, 0], ids[:, filled - 1], ids[:, filled:] = BOS, EOS, 0
        return ids

    num_codes, length = case.vocabulary.codebook_size, layout.left_text_length
    image = torch.randint(num_codes, (size, layout.num_image_tokens), generator=generator)
    segments = [texts(size, length, max(length // 2, 2)), image]
    if layout.right_text_length:
        segments.append(texts(size, layout.right_text_length, layout.right_text_length))
    side = case.vqgan.resolution
    return {
        "left": texts(1, length, max(length // 2, 2))[0],
        "tokens": torch.cat(segments, dim=1),
        "images": torch.rand(size, 3, side, side, generator=generator),
        "indices": torch.randint(
            num_codes, (size, (side // case.vqgan.factor) ** 2), generator=generator
        ),
        "checked": torch.cat(segments[:2], dim=1)[:1, : length + CHECKED_TOKENS],
    }


def expected_outputs(models: dict[str, nn.Module], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 outputs of our models on the fixed inputs.

    Returns:
        ``logits`` of the decoder on ``checked``, and ``images`` of the VQ-GAN or the upscaler in
        [0, 1]. A key is missing if ``models`` lacks the model.
    """
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        if isinstance(decoder := models.get("decoder"), MaskedDecoder):
            outputs["logits"] = decoder(inputs["checked"])
        if isinstance(vqgan := models.get("vqgan"), VQGAN):
            outputs["images"] = vqgan.decode_indices(inputs["indices"][:1])
        if isinstance(upscaler := models.get("upscaler"), Upscaler):
            outputs["images"] = upscaler(inputs["images"][:1])
    return outputs


def load_case_decoder(case: BenchmarkCase, folder: Path) -> MaskedDecoder:
    """Load the decoder in ``folder`` for inference."""
    with meta_device():
        model = MaskedDecoder(case.decoder, case.layout, case.vocabulary)
    load_exactly(model, load_file(folder / "decoder.safetensors"), family="speed")
    model.register_masks()
    return model.eval()


def load_case_vqgan(case: BenchmarkCase, folder: Path) -> VQGAN:
    """Load the VQ-GAN in ``folder`` for inference."""
    # Not on the meta device: some quantizers have constants that the file does not store.
    model = VQGAN(case.vqgan)
    model.load_state_dict(load_file(folder / "vqgan.safetensors"))
    return model.eval()


def load_case_upscaler(folder: Path) -> Upscaler:
    """Load the upscaler in ``folder`` for inference."""
    with meta_device():
        model = Upscaler(UpscalerConfig())
    load_exactly(model, load_file(folder / "upscaler.safetensors"), family="speed")
    return model.eval()


def load_case_inputs(folder: Path) -> dict[str, Tensor]:
    """Load the tensors that ``make_inputs`` returned."""
    return load_file(folder / "inputs.safetensors")
