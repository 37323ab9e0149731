"""Contestants that make pictures of a text from beginning to end, or larger ones of these: ours.

Tokenizing, drawing every image token, decoding, PNG files; the upscaler alone.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rudolph.benchmarks.decoding import SHORT, EnoughError, decoder_as, module_bytes
from rudolph.benchmarks.serving import Work
from rudolph.benchmarks.subject import CAPTION, Subject, load_inputs, load_upscaler, load_vqgan
from rudolph.generation.pictures import to_image
from rudolph.generation.pipeline import Pipeline, Request
from rudolph.sequence.tokenizer import Tokenizer


class Drawing:
    """``batch_size`` pictures of one caption."""

    def __init__(self, subject: Subject, kind: str, folder: Path) -> None:
        self.subject, self.folder = subject, folder / kind
        self.folder.mkdir(exist_ok=True)
        decoder, vqgan = decoder_as(subject, kind, folder), load_vqgan(subject, folder)
        size = subject.speed.batch_size
        self.pipeline = Pipeline(Tokenizer(folder / "bpe.model"), vqgan, decoder, batch_size=size)
        self.weights_bytes = module_bytes(decoder) + module_bytes(vqgan)
        self.versions: dict[str, str] = {}

    def run(self, part: str, *, is_short: bool) -> Work:
        size = self.subject.speed.batch_size

        def on_stage(stage: str, done: int, total: int) -> None:
            if is_short and done >= min(SHORT * size, total):
                raise EnoughError

        try:
            found = self.pipeline.generate(
                CAPTION,
                Request(number=size, seed=self.subject.seed),
                config=self.subject.sampling,
                on_stage=on_stage,
            )
        except EnoughError:
            # What it skips is warmed up by itself.
            self.pipeline.decode(torch.zeros(size, self.num_image_tokens, dtype=torch.long))
            return Work(size)
        for number, candidate in enumerate(found):
            to_image(candidate.image).save(self.folder / f"{number}.png")
        return Work(size)

    @property
    def num_image_tokens(self) -> int:
        return self.subject.layout.num_image_tokens

    def cache_bytes(self) -> int:
        return 0

    def check(self, path: Path) -> None:
        inputs = load_inputs(path.parent)
        with torch.no_grad():
            logits = self.pipeline.decoder(inputs["checked"])
        pictures = self.pipeline.vqgan.decode_indices(inputs["indices"][:1])
        save_file({"logits": logits.float(), "pictures": pictures.float()}, path)


class Upscaling:
    """Pictures through the upscaler, each whole."""

    def __init__(self, subject: Subject, kind: str, folder: Path) -> None:
        self.model = load_upscaler(folder).to(getattr(torch, kind))
        self.images = load_inputs(folder)["images"]
        self.weights_bytes = module_bytes(self.model)
        self.versions: dict[str, str] = {}

    @torch.inference_mode()
    def run(self, part: str, *, is_short: bool) -> Work:
        self.upscaled(self.images)
        return Work(len(self.images))

    def upscaled(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(images.to(self.model.conv_first.weight))
        return found

    def cache_bytes(self) -> int:
        return 0

    @torch.inference_mode()
    def check(self, path: Path) -> None:
        pictures = self.upscaled(load_inputs(path.parent)["images"][:1])
        save_file({"pictures": pictures.float().contiguous()}, path)
