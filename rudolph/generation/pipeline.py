"""Text to ranked images, and images to text, with a trained tokenizer, VQ-GAN and decoder.

Shapes: B texts or images, S samples per text or image, I image tokens, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rudolph.data.seeds import mixed_seed
from rudolph.generation.answering import OnToken, answer_prompts, batch_progress, sample_answers
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import generate_image
from rudolph.generation.ranking import PERPLEXITIES, rank_images
from rudolph.generation.tiled_upscaling import upscale_tiled
from rudolph.generation.trained_models import TrainedModels
from rudolph.models.cpu.prepacked_linear import prepack_in_own_dtype
from rudolph.models.upscaler import Upscaler

OnStage = Callable[[str, int, int], None]
RANKS = ("none", "self", "clip")


@dataclass(frozen=True)
class GenerationRequest:
    """Settings of ``Pipeline.generate`` besides the text and the sampling config.

    The best ``keep`` of ``number`` images by ``rank`` are returned; None keeps all.  ``rank`` is
    ``self`` (the decoder's own perplexity), ``clip`` or ``none``.  ``known`` (I,) holds indices
    that are given, and ``TO_SAMPLE`` at positions that are sampled.  With ``window`` above 1, that
    many tokens are guessed per call.  The images then differ from those at ``window`` 1, but
    follow the same distribution.

    Raises:
        ValueError: if a setting is out of range.
    """

    number: int = 8
    keep: int | None = None
    rank: str = "none"
    perplexity: str = "exp_mean_ce"
    seed: int = 0
    known: Tensor | None = None
    window: int = 1

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a setting is out of range."""
        if self.number < 1:
            raise ValueError(f"number must be at least 1, got {self.number}")
        if self.keep is not None and not 1 <= self.keep <= self.number:
            raise ValueError(f"keep must be 1 to the number {self.number}, got {self.keep}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.rank not in RANKS:
            raise ValueError(f"rank must be one of {', '.join(RANKS)}, got {self.rank!r}")
        if self.perplexity not in PERPLEXITIES:
            raise ValueError(
                f"perplexity must be one of {', '.join(PERPLEXITIES)}, got {self.perplexity!r}"
            )


@dataclass(frozen=True)
class Candidate:
    """An image ``(3, H, W)`` in [0, 1], its indices ``(I,)``, its seed and its scores."""

    image: Tensor
    indices: Tensor
    seed: int
    scores: dict[str, float]


class StageError(ValueError):
    """A failure of a stage after sampling; ``candidates`` holds the images so far, unranked.

    If decoding failed, ``candidates`` is empty and only ``indices`` (S, I) are available.
    """

    def __init__(
        self, message: str, *, indices: Tensor, seeds: list[int], candidates: list[Candidate]
    ) -> None:
        super().__init__(message)
        self.indices, self.seeds, self.candidates = indices, seeds, candidates


@dataclass
class Pipeline(TrainedModels):
    """Models that were trained together, and the stages from a text to ranked images.

    ``clip`` and ``upscaler`` are optional further stages.  Inputs and results are on the CPU, even
    if the models are on another device.
    """

    clip: ClipRanker | None = None
    upscaler: Upscaler | None = None

    def to(
        self, device: torch.device | str, *, image_dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Move all networks to a device.

        Args:
            device: the device of all networks.
            image_dtype: the dtype of the VQ-GAN and the upscaler; None keeps their dtype.

        Returns:
            The pipeline itself.
        """
        clip = self.clip.clip if self.clip is not None else None
        for network in (self.vqgan, self.decoder, clip, self.upscaler):
            if network is not None:
                is_of_images = network is self.vqgan or network is self.upscaler
                network.to(device, image_dtype if is_of_images else None)
        return self

    def pack(
        self,
        number: int,
        config: TokenSamplingConfig,
        *,
        window: int = 1,
        is_compiled: bool = False,
    ) -> None:
        """Convert the decoder's weights to the layout that is fastest at this number of samples.

        Afterwards the decoder supports sampling and ranking only.

        Args:
            number: samples per text.
            config: the sampling config; guidance doubles the number of rows.
            window: tokens per call, as in ``GenerationRequest``.
            is_compiled: whether torch compiles the step of a layer.  Compilation takes seconds,
                which pay off over many tokens.

        Raises:
            ValueError: if torch cannot compile.
        """
        num_rows = min(number, self.batch_size) * (1 if config.guidance is None else 2) * window
        prepack_in_own_dtype(self.decoder, num_rows=num_rows, is_compiled=is_compiled)

    def generate(
        self,
        text: str,
        request: GenerationRequest,
        *,
        config: TokenSamplingConfig,
        on_stage: OnStage | None = None,
    ) -> list[Candidate]:
        """Generate images of one text, best first: sample, decode, rank and upscale.

        Ranking by ``self`` adds the scores ``perplexity_text``, ``perplexity_image`` and ``self``,
        of which lower is better.  A pipeline with a CLIP adds ``clip``, of which higher is better.
        Image k has the seed ``mixed_seed(seed, k)``, independent of the number of images and of
        the batch size.

        Args:
            text: the caption.
            request: the number of images, their ranking and their seed.
            config: how image tokens are sampled.
            on_stage: called with the name of the stage, the amount done and the total amount.

        Raises:
            ValueError: if ``rank`` is ``clip`` and the pipeline has no CLIP.
            StageError: if a stage fails after sampling; it holds the results so far.
        """
        if request.rank == "clip" and self.clip is None:
            raise ValueError("rank clip: expected a pipeline with a CLIP, got none")
        report = on_stage or _ignore_progress
        seeds = [mixed_seed(request.seed, index) for index in range(request.number)]
        known = None if request.known is None else request.known[None]
        indices = self.generate_indices(
            [text],
            config=config,
            seeds=seeds,
            known=known,
            window=request.window,
            on_token=partial(report, "sample"),
        )
        candidates: list[Candidate] = []
        stage = "decode"

        def start_stage(name: str) -> Callable[[int, int], None]:
            nonlocal stage
            stage = name
            return partial(report, name)

        try:
            images = self.decode(indices, on_batch=start_stage("decode"))
            parts = zip(images, indices, seeds, strict=True)
            candidates += [Candidate(*part, {}) for part in parts]
            best = self._ranked(candidates, text, request, start_stage)[: request.keep]
            if self.upscaler is None:
                return best
            best_images = torch.stack([candidate.image for candidate in best])
            upscaled = self.upscale(best_images, on_tile=start_stage("upscale"))
        # Torch, the file system and our own checks raise these.
        except (RuntimeError, ValueError, MemoryError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StageError(
                f"{stage}: {reason}", indices=indices, seeds=seeds, candidates=candidates
            ) from error
        pairs = zip(best, upscaled, strict=True)
        return [replace(candidate, image=image) for candidate, image in pairs]

    def _ranked(
        self,
        candidates: list[Candidate],
        text: str,
        request: GenerationRequest,
        start_stage: Callable[[str], Callable[[int, int], None]],
    ) -> list[Candidate]:
        """Return the candidates best first, and write the scores into each candidate."""
        order = list(range(len(candidates)))
        if request.rank == "self":
            indices = torch.stack([candidate.indices for candidate in candidates])
            ranking = rank_images(
                self, indices, text, kind=request.perplexity, on_batch=start_stage("rank")
            )
            order = ranking.order()
            for index, candidate in enumerate(candidates):
                candidate.scores["perplexity_text"] = ranking.text[index].item()
                candidate.scores["perplexity_image"] = ranking.image[index].item()
                candidate.scores["self"] = ranking.score[index].item()
        if self.clip is not None:
            images = torch.stack([candidate.image for candidate in candidates])
            similarities = self.clip.similarities(images, [text], on_batch=start_stage("clip"))[
                :, 0
            ]
            for index, candidate in enumerate(candidates):
                candidate.scores["clip"] = similarities[index].item()
            if request.rank == "clip":
                order = torch.sort(similarities, descending=True, stable=True).indices.tolist()
        return [candidates[index] for index in order]

    def upscale(self, images: Tensor, *, on_tile: Callable[[int, int], None]) -> Tensor:
        """Upscale images ``(B, 3, H, W)`` in [0, 1] tile by tile.

        Raises:
            ValueError: if the pipeline has no upscaler.
        """
        if self.upscaler is None:
            raise ValueError("expected a pipeline with an upscaler, got none")
        device = self.upscaler.conv_first.weight.device
        return upscale_tiled(self.upscaler, images.to(device), on_tile=on_tile).cpu()

    def generate_images(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Sample images ``(B * S, 3, H, W)`` in [0, 1], S per caption.

        Args:
            captions: B texts.
            config: how image tokens are sampled.
            seeds: one per image, B * S, with the images of a caption next to each other.
            on_token: called with the number of tokens done and the total.

        Raises:
            ValueError: if the number of seeds is not a multiple of the number of captions.
        """
        indices = self.generate_indices(captions, config=config, seeds=seeds, on_token=on_token)
        return self.decode(indices)

    def generate_indices(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        known: Tensor | None = None,
        window: int = 1,
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Sample image indices ``(B * S, I)``, S per caption.

        Args:
            captions: B texts.
            config: how image tokens are sampled.
            seeds: one per image, B * S, with the images of a caption next to each other.
            known: ``(B, I)``, indices that are given, and ``TO_SAMPLE`` at the other positions.
            window: tokens guessed per call; above 1, tokens are sampled by an exponential race.
            on_token: called with the number of tokens done and the total.

        Raises:
            ValueError: if the number of seeds is not a multiple of the number of captions.
        """
        if not captions or len(seeds) % len(captions):
            raise ValueError(
                f"seeds: expected a multiple of the {len(captions)} captions, got {len(seeds)}"
            )
        left = torch.stack([self.texts("text_to_image", caption).left for caption in captions])
        empty = self.texts("text_to_image", "").left
        start = self.decoder.layout.image_start
        parts = []
        for rows, samples in self.batches(len(captions), len(seeds)):
            parts.append(
                generate_image(
                    self.decoder,
                    left[rows].to(self.device),
                    config=config,
                    seeds=seeds[samples],
                    unconditional=empty.to(self.device),
                    known=None if known is None else known[rows].to(self.device),
                    window=window,
                    coupling="inversion" if window == 1 else "race",
                    on_token=batch_progress(on_token, samples, len(seeds), self.decoder, start),
                ).cpu()
            )
        return torch.cat(parts)

    def caption(
        self,
        images: Tensor,
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        questions: Sequence[str] | None = None,
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Sample captions of images, or answers to questions about them, S per image.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            config: how tokens are sampled.
            seeds: one per text, B * S, with the texts of an image next to each other.
            questions: one per image; None samples captions.
            on_token: called with the number of tokens done and the total.

        Returns:
            B * S texts, in the order of ``seeds``.
        """
        task = "image_captioning" if questions is None else "question_answering"
        tokens = answer_prompts(self, task, indices=self.encode(images), questions=questions)
        return sample_answers(self, tokens, config=config, seeds=seeds, on_token=on_token)


def _ignore_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress."""
