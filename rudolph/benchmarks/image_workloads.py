"""Our implementations of generating images from a text and of upscaling images.

Generation covers tokenizing, sampling every image token, decoding and writing PNG files.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rudolph.benchmarks.benchmark_case import (
    CAPTION,
    BenchmarkCase,
    load_case_inputs,
    load_case_upscaler,
    load_case_vqgan,
)
from rudolph.benchmarks.decoding_workload import (
    WARM_UP_TOKENS,
    StopDecodingError,
    module_bytes,
    prepared_decoder,
)
from rudolph.benchmarks.serving import WorkResult
from rudolph.generation.pipeline import GenerationRequest, Pipeline
from rudolph.generation.png import to_image
from rudolph.sequence.tokenizer import Tokenizer


class GenerationWorkload:
    """Generation of ``batch_size`` images for one caption, from text to PNG files."""

    def __init__(self, case: BenchmarkCase, implementation: str, folder: Path) -> None:
        self.case, self.folder = case, folder / implementation
        self.folder.mkdir(exist_ok=True)
        decoder, vqgan = (
            prepared_decoder(case, implementation, folder),
            load_case_vqgan(case, folder),
        )
        size = case.speed.batch_size
        self.pipeline = Pipeline(Tokenizer(folder / "bpe.model"), vqgan, decoder, batch_size=size)
        self.weights_bytes = module_bytes(decoder) + module_bytes(vqgan)
        self.versions: dict[str, str] = {}

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Generate one batch of images; a short repetition stops the sampling early."""
        size = self.case.speed.batch_size

        def on_stage(stage: str, done: int, total: int) -> None:
            if is_short and done >= min(WARM_UP_TOKENS * size, total):
                raise StopDecodingError

        try:
            candidates = self.pipeline.generate(
                CAPTION,
                GenerationRequest(number=size, seed=self.case.seed),
                config=self.case.sampling,
                on_stage=on_stage,
            )
        except StopDecodingError:
            # The stopped sampling skips the VQ-GAN, so it is warmed up separately.
            self.pipeline.decode(torch.zeros(size, self.num_image_tokens, dtype=torch.long))
            return WorkResult(size)
        for index, candidate in enumerate(candidates):
            to_image(candidate.image).save(self.folder / f"{index}.png")
        return WorkResult(size)

    @property
    def num_image_tokens(self) -> int:
        """Return the number of image tokens per image."""
        return self.case.layout.num_image_tokens

    def cache_bytes(self) -> int:
        """Return 0: this workload does not measure the cache."""
        return 0

    def check(self, path: Path) -> None:
        """Write the decoder's logits and the VQ-GAN's images for the fixed inputs to ``path``."""
        inputs = load_case_inputs(path.parent)
        with torch.no_grad():
            logits = self.pipeline.decoder(inputs["checked"])
        images = self.pipeline.vqgan.decode_indices(inputs["indices"][:1])
        save_file({"logits": logits.float(), "images": images.float()}, path)


class UpscalingWorkload:
    """Upscaling of a batch of images, without tiling."""

    def __init__(self, case: BenchmarkCase, implementation: str, folder: Path) -> None:
        self.model = load_case_upscaler(folder).to(getattr(torch, implementation))
        self.images = load_case_inputs(folder)["images"]
        self.weights_bytes = module_bytes(self.model)
        self.versions: dict[str, str] = {}

    @torch.inference_mode()
    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Upscale one batch of images."""
        self.upscaled(self.images)
        return WorkResult(len(self.images))

    def upscaled(self, images: Tensor) -> Tensor:
        """Return the upscaled images, computed in the model's dtype."""
        upscaled_images: Tensor = self.model(images.to(self.model.conv_first.weight))
        return upscaled_images

    def cache_bytes(self) -> int:
        """Return 0: the upscaler has no cache."""
        return 0

    @torch.inference_mode()
    def check(self, path: Path) -> None:
        """Write the upscaled first image to ``path``."""
        images = self.upscaled(load_case_inputs(path.parent)["images"][:1])
        save_file({"images": images.float().contiguous()}, path)
