"""RUDOLPH and ruDALL-E: one masked decoder over left text, image tokens and right text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rudolph.data.examples import MixtureExamples, TokenExamples, task_texts
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import MixtureEntry, Splits
from rudolph.families.interface import (
    Capabilities,
    ModelSection,
    Parts,
    RunSettings,
    TrainingFlags,
)
from rudolph.generation.answering import (
    OnToken,
    answer_prompts,
    ids_spelling,
    sample_answers,
    sample_question_images,
    score_choices,
)
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.trained_models import ImageTokenizer
from rudolph.models.cpu.int8 import unpack_int8
from rudolph.models.rudolph.adapt import adapt
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import load_exactly, read_weights, save_weights
from rudolph.sequence.layout import SEGMENTS
from rudolph.sequence.tasks import TASKS, Texts, fill_texts
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.losses import DecoderLossConfig
from rudolph.training.tuning import TuningConfig, apply_tuning

if TYPE_CHECKING:
    from rudolph.training.decoder import DecoderTraining

# Files of a trained decoder and its parts in a run's ``checkpoints``.
FILES = ("decoder.safetensors", "vqgan.safetensors", "bpe.model")


@dataclass(frozen=True)
class RudolphConfig(DecoderConfig, ModelSection):
    """The ``model`` section of family ``rudolph``.

    With ``init``, the tokenizer and the VQ-GAN come from the same source, unless
    ``tokenizer.path`` and ``vqgan.init`` name others.
    """

    family: Literal["rudolph"] = "rudolph"
    losses: DecoderLossConfig = field(default_factory=DecoderLossConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)

    @property
    def tokenizer_source(self) -> str | None:
        """Return the source of the tokenizer: the trained decoder has its own."""
        return self.init

    @property
    def architecture(self) -> DecoderConfig:
        """Return the settings that determine the decoder's shape and initialisation."""
        return DecoderConfig(
            **{each.name: getattr(self, each.name) for each in fields(DecoderConfig)}
        )


class RudolphCapabilities(Capabilities):
    """Generation, likelihood and image tokens of a masked decoder."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def generate_image(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Generate images ``(B, 3, H, W)`` in [0, 1], one per caption, each from its own seed."""
        return self.pipeline.generate_images(
            captions, config=config, seeds=seeds, on_token=on_token
        )

    def generate_text(
        self,
        task: str,
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        allowed_characters: str | None = None,
        missing_image: TokenSamplingConfig | None = None,
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Generate one text per seed; see ``Capabilities.generate_text``."""
        indices = None if images is None else self.pipeline.encode(images)
        if indices is None and questions is not None and missing_image is not None:
            indices = sample_question_images(
                self.pipeline, task, questions, config=missing_image, seeds=seeds
            )
        tokens = answer_prompts(
            self.pipeline, task, indices=indices, questions=questions, num_prompts=len(seeds)
        )
        allowed = None
        if allowed_characters is not None:
            allowed = ids_spelling(self.pipeline, allowed_characters)
        return sample_answers(
            self.pipeline, tokens, config=config, seeds=seeds, allowed=allowed, on_token=on_token
        )

    def loglikelihood(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Compute the log-likelihood ``(B, C)`` in nats of each choice as the text of a task."""
        indices = None if images is None else self.pipeline.encode(images)
        tokens = answer_prompts(self.pipeline, task, indices=indices, questions=questions)
        scored = score_choices(self.pipeline, task, tokens, choices, on_batch=on_batch)
        return scored.log_likelihoods

    def image_tokenizer(self) -> ImageTokenizer:
        """Return the image tokenizer of the pipeline."""
        return self.pipeline.image_tokenizer

    def token_pipeline(self) -> Pipeline:
        """Return the masked decoder with its tokenizers."""
        return self.pipeline


class RudolphFamily:
    """The masked decoder as a ``families.interface.Family``."""

    config = RudolphConfig
    stage = "decoder"
    reads_images = True
    is_trained = True
    can_shard = True
    weights_file = FILES[0]
    capabilities = RudolphCapabilities

    def needs(self, section: Any) -> tuple[str, ...]:
        """Return the parts that a run trains or loads first."""
        return ("tokenizer", "vqgan", "image_indices")

    def check(self, run: RunSettings) -> None:
        """Check that the legacy loss of the first image token can score every code as a text id.

        Raises:
            ValueError: If the codebook is larger than the text vocabulary.
        """
        codes, texts = run.vocabulary.codebook_size, run.vocabulary.text_size
        if run.model.losses.first_image_token == "legacy" and codes > texts:
            raise ValueError(
                f"model.losses.first_image_token: legacy scores codes as text ids, and of "
                f"{codes} codes only {texts} are (tokenizer.vocab_size, layout.left_text_length)"
            )

    def check_flags(self, run: RunSettings, flags: TrainingFlags) -> None:
        """Check that hardware flags fit the settings; block masks, for example, allow no dropout.

        Raises:
            ValueError: If they do not; the message names the setting.
        """
        dropout, rank = run.model.attention_dropout, run.model.tuning.lora_rank
        if flags.hardware.block_masks and dropout:
            raise ValueError(
                f"model.attention_dropout must be 0 with --block-masks, got {dropout:g}"
            )
        if flags.hardware.strategy == "fsdp2":
            _require_shardable(run)
        if flags.hardware.compile and rank is not None:
            # Each low-rank layer is a class of its own, so torch would compile each one
            # separately.
            raise ValueError(f"model.tuning.lora_rank must be null with --compile, got {rank}")

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield the names of the logged curves, also those of segments and mixture entries."""
        rows = {entry.name: _scored_segments(entry, run) for entry in run.data.mixture}
        scored = [name for name in SEGMENTS if any(name in own for own in rows.values())]
        for stage in ("train", "val"):
            yield f"{stage}/loss"
            yield from (f"{stage}/loss/{name}" for name in scored)
            if len(rows) > 1:
                for row, own in rows.items():
                    yield from (f"{stage}/loss/{row}/{name}" for name in own)
        if len(rows) > 1:
            yield from (f"train/fraction/{row}" for row in rows)
        if run.model.losses.weighting == "learned":
            yield from (f"train/weight/{name}" for name in SEGMENTS)

    def empty(self, run: RunSettings) -> MaskedDecoder:
        """Construct a decoder without a seed, for example to count weights on the meta device."""
        return MaskedDecoder(run.model.architecture, run.sequence_layout, run.vocabulary)

    def build(self, run: RunSettings, parts: Parts) -> MaskedDecoder:
        """Build a decoder initialised from the run's seed.

        With ``image_embedding_init: codebook``, the image embeddings come from the VQ-GAN's
        codebook.
        """
        torch.manual_seed(mixed_seed(run.seed, self.stage))
        model = self.empty(run)
        if run.model.init_by_name:
            model.init_by_name(partial(mixed_seed, run.seed, self.stage))
        if run.model.image_embedding_init == "codebook":
            assert parts.vqgan is not None
            every = torch.arange(run.vqgan.quantizer.num_codes)
            model.init_from_codebook(parts.vqgan.quantize.codes(every[:, None, None])[:, :, 0, 0])
        return model

    def adapt(self, source: nn.Module, target: nn.Module) -> list[str]:
        """Copy trained weights into ``target`` and return one line per resized tensor."""
        assert isinstance(source, MaskedDecoder) and isinstance(target, MaskedDecoder)
        return adapt(source, target)

    def examples(self, run: RunSettings, splits: Splits, name: str, parts: Parts) -> TokenExamples:
        """Return the token examples of the data mixture in a split."""
        return TokenExamples(
            [mixture_examples(run, entry, splits, name, parts) for entry in run.data.mixture],
            run.data,
            layout=run.sequence_layout,
            vocabulary=run.vocabulary,
            num_examples=run.optim.num_steps * run.optim.global_batch_size,
            seed=run.seed,
            task_weights=run.model.losses.task_weights,
        )

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> "DecoderTraining":
        """Return the Lightning module that trains the decoder, with tuning and flags applied."""
        from rudolph.training.decoder import DecoderTraining

        apply_tuning(model, run.model.tuning)
        model.has_checkpointing = flags.hardware.activation_checkpointing
        model.has_block_masks = flags.hardware.block_masks
        model.has_compiled_layers = flags.hardware.compile
        return DecoderTraining(
            model,
            run.model.losses,
            run.optim,
            sources=[each.source.name for each in examples.entries],
        )

    def open(self, run: RunSettings, model: Any, parts: Parts) -> RudolphCapabilities:
        """Return the capabilities of a trained decoder."""
        assert parts.tokenizer is not None and parts.vqgan is not None
        return RudolphCapabilities(Pipeline(parts.tokenizer, parts.vqgan, model))

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        """Write the VQ-GAN and the tokenizer; return their files and the decoder's file."""
        assert parts.tokenizer is not None and parts.vqgan is not None
        decoder, vqgan, tokenizer = (folder / name for name in FILES)
        save_weights(parts.vqgan, vqgan)
        parts.tokenizer.save(tokenizer)
        return [decoder, vqgan, tokenizer]

    def restore(self, folder: Path, run: RunSettings) -> tuple[MaskedDecoder, Parts]:
        """Load the decoder, the VQ-GAN and the tokenizer of a run, in float32 on the CPU."""
        decoder, vqgan = self.empty(run), VQGAN(run.vqgan)
        for module, name in ((decoder, FILES[0]), (vqgan, FILES[1])):
            tensors = unpack_int8(read_weights(folder / name))
            load_exactly(module, tensors, family=str(folder / name))
            # A packed run stores 16 or 8 bits per weight.
            module.float()
        return decoder, Parts(Tokenizer(folder / FILES[2]), vqgan)


def _scored_segments(entry: MixtureEntry, run: RunSettings) -> list[str]:
    """Return the segments that have a loss weight above 0 in a mixture entry."""
    weights = run.model.losses.task_weights.get(entry.task, TASKS[entry.task].weights)
    return [name for name, weight in zip(SEGMENTS, weights, strict=True) if weight > 0]


def mixture_examples(
    run: RunSettings, entry: MixtureEntry, splits: Splits, name: str, parts: Parts
) -> MixtureExamples:
    """Return the texts and image indices of a mixture entry.

    With BPE-dropout, texts are encoded again for each example.
    """
    split, tokenizer = splits(name, entry.dataset), parts.tokenizer
    assert tokenizer is not None and parts.image_indices is not None
    task, dropout = TASKS[entry.task], run.tokenizer.bpe_dropout
    sizes: dict[str, Any] = {"layout": run.sequence_layout, "vocabulary": run.vocabulary}

    def encode_again(pair: int, generator: torch.Generator) -> Texts:
        return fill_texts(
            task,
            split.captions[pair],
            tokenizer=tokenizer,
            other_text=split.questions[pair] if task.has_question else "",
            dropout=dropout,
            generator=generator,
            **sizes,
        )

    texts = task_texts(split, entry.task, tokenizer=tokenizer, **sizes)
    indices = parts.image_indices(split) if split.has_images else None
    return MixtureExamples(entry, texts, indices, encode_again if dropout else None)


def _require_shardable(run: RunSettings) -> None:
    """Raise ``ValueError`` for settings that a decoder sharded by FSDP2 cannot train."""
    for name, value, expected in (
        ("optim.ema_decay", run.optim.ema_decay, None),
        ("model.losses.weighting", run.model.losses.weighting, "fixed"),
        ("model.tuning.lora_rank", run.model.tuning.lora_rank, None),
    ):
        if value != expected:
            needed = "null" if expected is None else expected
            raise ValueError(f"{name} must be {needed} with --strategy fsdp2, got {value}")
