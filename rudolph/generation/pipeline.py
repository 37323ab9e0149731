"""Text to images and images to text with a trained tokenizer, VQ-GAN and decoder.

Shapes: B texts or images, S samples of each, I image tokens, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rudolph.data.seeds import mixed_seed
from rudolph.generation.answering import answer_prompts, batch_progress, sample_answers
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import generate_image
from rudolph.generation.ranking import PERPLEXITIES, rank_images
from rudolph.generation.tiled_upscaling import upscale_tiled
from rudolph.generation.trained_models import TrainedModels
from rudolph.models.cpu.prepacked_linear import prepack_in_own_dtype
from rudolph.models.upscaler import Upscaler

OnToken = Callable[[int, int], None]
OnStage = Callable[[str, int, int], None]
RANKS = ("none", "self", "clip")


@dataclass(frozen=True)
class Request:
    """What ``Pipeline.generate`` is asked for beside the text.

    ``keep`` of ``number`` images stay, the best by ``rank``: ``self`` (the decoder's own
    perplexity), ``clip`` or ``none``.  ``known`` (I,) are indices that are given and not drawn,
    ``FREE`` where they are.  With a ``window`` above 1 so many tokens are guessed at once, and
    other images are drawn, of the same distribution.
    """

    number: int = 8
    keep: int | None = None
    rank: str = "none"
    perplexity: str = "exp_mean_ce"
    seed: int = 0
    known: Tensor | None = None
    window: int = 1

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"number must be at least 1, got {self.number}")
        if self.keep is not None and not 1 <= self.keep <= self.number:
            raise ValueError(f"keep must be 1 to {self.number}, the number, got {self.keep}")
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
    """A stage after sampling failed.  What was sampled is in ``candidates``, unranked.

    Where decoding failed ``candidates`` is empty and there are only ``indices`` (S, I).
    """

    def __init__(
        self, message: str, *, indices: Tensor, seeds: list[int], candidates: list[Candidate]
    ) -> None:
        super().__init__(message)
        self.indices, self.seeds, self.candidates = indices, seeds, candidates


@dataclass
class Pipeline(TrainedModels):
    """Models that were trained together, and the stages from a text to ranked images.

    ``clip`` and ``upscaler`` are further stages, each of which may be left out.  Tensors come and
    go on the CPU, wherever the models are.
    """

    clip: ClipRanker | None = None
    upscaler: Upscaler | None = None

    def to(
        self, device: torch.device | str, *, image_dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Move the networks; ``image_dtype`` is for the VQ-GAN and the upscaler."""
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
        """Put weights in the layout that is read fastest for so many samples.

        The decoder can only sample and rank from then on.

        Args:
            window: tokens a call, as in ``Request``.
            is_compiled: whether torch compiles a layer's step, for seconds that many tokens repay.

        Raises:
            ValueError: where torch cannot compile.
        """
        num_rows = min(number, self.batch_size) * (1 if config.guidance is None else 2) * window
        prepack_in_own_dtype(self.decoder, num_rows=num_rows, is_compiled=is_compiled)

    def generate(
        self,
        text: str,
        request: Request,
        *,
        config: TokenSamplingConfig,
        on_stage: OnStage | None = None,
    ) -> list[Candidate]:
        """Return images of one text, best first: sampled, decoded, ranked, enlarged.

        Every stage leaves its scores: ``perplexity_text``, ``perplexity_image`` and ``self``, of
        which less is better, and ``clip``, of which more is.  Image k has the seed
        ``mixed_seed(seed, k)``, in whatever number and batch it is sampled.

        Raises:
            ValueError: when it is asked to rank by a CLIP that it has not.
            StageError: when a stage fails after sampling; it holds what there is by then.
        """
        if request.rank == "clip" and self.clip is None:
            raise ValueError("ranking by clip needs a CLIP")
        told = on_stage or _silent
        seeds = [mixed_seed(request.seed, number) for number in range(request.number)]
        known = None if request.known is None else request.known[None]
        indices = self.generate_indices(
            [text],
            config=config,
            seeds=seeds,
            known=known,
            window=request.window,
            on_token=partial(told, "draw"),
        )
        candidates: list[Candidate] = []
        stage = "decode"

        def begin(name: str) -> Callable[[int, int], None]:
            nonlocal stage
            stage = name
            return partial(told, name)

        try:
            images = self.decode(indices, on_batch=begin("decode"))
            candidates += [
                Candidate(*each, {}) for each in zip(images, indices, seeds, strict=True)
            ]
            kept = self._ranked(candidates, text, request, begin)[: request.keep]
            if self.upscaler is None:
                return kept
            finished = self.enlarge(
                torch.stack([each.image for each in kept]), on_tile=begin("enlarge")
            )
        # What torch, the file system and our own checks raise.
        except (RuntimeError, ValueError, MemoryError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StageError(
                f"{stage}: {reason}", indices=indices, seeds=seeds, candidates=candidates
            ) from error
        return [replace(each, image=image) for each, image in zip(kept, finished, strict=True)]

    def _ranked(
        self,
        candidates: list[Candidate],
        text: str,
        request: Request,
        begin: Callable[[str], Callable[[int, int], None]],
    ) -> list[Candidate]:
        """Return the candidates best first, and leave the scores of each in it."""
        order = list(range(len(candidates)))
        if request.rank == "self":
            indices = torch.stack([each.indices for each in candidates])
            ranking = rank_images(
                self, indices, text, kind=request.perplexity, on_batch=begin("rank")
            )
            order = ranking.order()
            for at, candidate in enumerate(candidates):
                candidate.scores["perplexity_text"] = ranking.text[at].item()
                candidate.scores["perplexity_image"] = ranking.image[at].item()
                candidate.scores["self"] = ranking.score[at].item()
        if self.clip is not None:
            images = torch.stack([each.image for each in candidates])
            similar = self.clip.similarities(images, [text], on_batch=begin("clip"))[:, 0]
            for at, candidate in enumerate(candidates):
                candidate.scores["clip"] = similar[at].item()
            if request.rank == "clip":
                order = torch.sort(similar, descending=True, stable=True).indices.tolist()
        return [candidates[at] for at in order]

    def enlarge(self, images: Tensor, *, on_tile: Callable[[int, int], None]) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1], enlarged tile by tile."""
        if self.upscaler is None:
            raise ValueError("enlarging needs an upscaler")
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
        """Images ``(B * S, 3, H, W)`` in [0, 1], S of each caption by ``seeds`` (B * S)."""
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
        """Image indices ``(B * S, I)``; see ``generate_images``.

        Args:
            known: ``(B, I)``, indices that are given and not drawn; ``FREE`` where they are drawn.
            window: above 1, tokens that are guessed at once; drawn by races.
        """
        if not captions or len(seeds) % len(captions):
            raise ValueError(
                f"seeds must be as many for each of {len(captions)} captions, got {len(seeds)}"
            )
        left = torch.stack([self.texts("text_to_image", caption).left for caption in captions])
        empty = self.texts("text_to_image", "").left
        start = self.decoder.layout.image_start
        parts = []
        for rows, own in self.batches(len(captions), len(seeds)):
            parts.append(
                generate_image(
                    self.decoder,
                    left[rows].to(self.device),
                    config=config,
                    seeds=seeds[own],
                    unconditional=empty.to(self.device),
                    known=None if known is None else known[rows].to(self.device),
                    window=window,
                    coupling="inversion" if window == 1 else "race",
                    on_token=batch_progress(on_token, own, len(seeds), self.decoder, start),
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
        """Captions of images ``(B, 3, H, W)`` in [0, 1], S of each by ``seeds`` (B * S).

        Args:
            questions: one of each image; then the texts are answers to them.
        """
        task = "image_captioning" if questions is None else "question_answering"
        tokens = answer_prompts(self, task, indices=self.encode(images), questions=questions)
        return sample_answers(self, tokens, config=config, seeds=seeds, on_token=on_token)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress."""
