"""The quickstart from data to scores, stage by stage, on this device.

The configuration equals ``experiments/quickstart.yaml``. It is repeated here because a bare
machine lacks the packages that read configuration files; a test keeps both equal.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from rudolph.config.experiment_file import Run
from rudolph.config.run import RunConfig, SamplingConfig, TextLengths, digest_of
from rudolph.data.splits import DataConfig, Splits
from rudolph.evaluation.report_card import EvaluationConfig
from rudolph.families.interface import Parts
from rudolph.families.registry import family_of
from rudolph.families.rudolph import RudolphConfig
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.gpu_check.resuming import ignore_progress
from rudolph.gpu_check.rows import Case, CheckRow
from rudolph.gpu_check.sizes import Sizes
from rudolph.models.vqgan.model import VQGANConfig
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.models.weights import load_exactly, read_weights
from rudolph.runs.execution import Execution, Folders, Hardware, NullRecorder
from rudolph.runs.resolve import SHIPPED, SHIPPED_RUN
from rudolph.runs.stages.evaluation import run_evaluators
from rudolph.runs.stages.image_tokenizer import image_indices, make_vqgan
from rudolph.runs.stages.model import train_model
from rudolph.runs.stages.tokenizer import open_data
from rudolph.sequence.tokenizer import TokenizerConfig
from rudolph.tracking.run_directory import RunDirectory
from rudolph.training.losses import DecoderLossConfig, ReconstructionLossConfig
from rudolph.training.optim import OptimConfig

QUICKSTART_RESULTS = Path(__file__).resolve().parents[2] / "results" / "quickstart" / "runs.csv"
EVALUATORS_SCORED = (
    "reconstruction",
    "nearest_image",
    "nearest_image_of_grid",
    "caption_f1",
)
SHIPPED_VQGAN = RunDirectory(SHIPPED_RUN).checkpoints / "vqgan.safetensors"
SCORED_SPLITS = ("validation", "train", "compositional")


def quickstart_config() -> RunConfig:
    """Return the configuration of the quickstart, without the prompts of its sample grid."""
    muon = OptimConfig(optimizer="muon")
    return RunConfig(
        data=DataConfig(
            dataset="emoji",
            image_size=64,
            image_token_noise=1.0,
            tasks={"text_to_image": 0.7, "image_captioning": 0.3},
        ),
        tokenizer=TokenizerConfig(vocab_size=2048),
        layout=TextLengths(14, 14),
        vqgan=quickstart_vqgan(),
        vqgan_losses=ReconstructionLossConfig(l1_weight=0.0, l2_weight=2.0),
        vqgan_optim=replace(
            muon,
            num_steps=1000,
            global_batch_size=32,
            learning_rate=0.003,
            muon_learning_rate=0.008,
            warmup_steps=20,
            final_learning_rate_fraction=0.01,
            weight_decay=0.01,
            validate_every=250,
            checkpoint_every=500,
        ),
        model=quickstart_decoder(),
        optim=replace(
            muon,
            num_steps=3200,
            global_batch_size=32,
            learning_rate=0.006,
            muon_learning_rate=0.005,
            warmup_steps=30,
            final_learning_rate_fraction=0.02,
            weight_decay=0.05,
            validate_every=800,
            checkpoint_every=800,
        ),
        sampling=SamplingConfig(image=TokenSamplingConfig(top_k=1, guidance=2.0)),
        evaluation=EvaluationConfig(EVALUATORS_SCORED, SCORED_SPLITS, grid_samples=1),
    )


def quickstart_vqgan() -> VQGANConfig:
    """Return the VQ-GAN configuration of the quickstart, which is that of the demo model."""
    return VQGANConfig(
        init=SHIPPED,
        resolution=64,
        channels=(32, 64, 96, 96),
        num_res_blocks=1,
        attention_resolutions=(8,),
        z_channels=32,
        norm_groups=4,
        quantizer=QuantizerConfig("ema", 2048, 8),
    )


def quickstart_decoder() -> RudolphConfig:
    """Return the decoder configuration of the quickstart."""
    return RudolphConfig(
        num_layers=2,
        hidden_size=128,
        num_heads=4,
        layer_masks=("row", "column", "row", "conv(5)"),
        last_layer_mask="conv(7)",
        embedding_gradient=1.0,
        attention_dropout=0.0,
        output_dropout=0.0,
        position_init_std=0.5,
        gelu="none",
        image_embedding_init="codebook",
        losses=DecoderLossConfig(0.0, 1.0, 0.8),
    )


def smallest_config(config: RunConfig) -> RunConfig:
    """Return the configuration with two steps per training and two images to score.

    All stages use the VQ-GAN of the training stage, not that of the demo model.
    """
    steps: dict[str, Any] = {"num_steps": 2, "global_batch_size": 2, "validate_every": 2}
    return replace(
        config,
        tokenizer=replace(config.tokenizer, vocab_size=300),
        vqgan=replace(
            config.vqgan,
            init=None,
            channels=(4, 4, 4, 8),
            z_channels=8,
            attention_resolutions=(),
        ),
        vqgan_optim=replace(config.vqgan_optim, **steps),
        model=replace(config.decoder, num_layers=1, hidden_size=32, num_heads=2),
        optim=replace(config.optim, **steps),
        evaluation=replace(config.evaluation, splits=("compositional",), num_examples=2),
    )


def quickstart_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield the stages in order; each stage needs those before it."""
    config = quickstart_config()
    config = smallest_config(config) if sizes.is_smoke else config
    with TemporaryDirectory() as folder:
        quickstart = Quickstart(config, sizes, Path(folder))
        for name, run in quickstart.stages().items():
            yield Case(name, partial(timed, run))


def timed(run: Callable[[], Iterator[CheckRow]]) -> Iterator[CheckRow]:
    """Yield the rows of a stage, then its duration."""
    started = perf_counter()
    yield from run()
    yield CheckRow("stage", perf_counter() - started, "s")


class Quickstart:
    """A run of the quickstart with the results of its completed stages."""

    def __init__(self, config: RunConfig, sizes: Sizes, folder: Path) -> None:
        hardware = Hardware(accelerator="cpu" if sizes.is_smoke else "auto")
        self.config, run = config, Run("seed0", "", {}, config)
        folders = Folders(folder, folder / "runs")
        self.execution = Execution(
            run, folder / "run", folders, hardware, NullRecorder(), ignore_progress
        )
        self.execution.folder.mkdir()
        self.splits = Splits(config.data, folders.cache)

    def stages(self) -> dict[str, Callable[[], Iterator[CheckRow]]]:
        """Return the stages in order, keyed by name."""
        return {
            "data and tokenizer": self.open_data,
            "VQ-GAN training": self.train_vqgan,
            "image tokens": self.encode_images,
            "decoder training": self.train_decoder,
            "sampling and scores": self.score,
        }

    def open_data(self) -> Iterator[CheckRow]:
        """Open the data and train the tokenizer."""
        torch.manual_seed(self.config.seed)
        tokenizer = open_data(self.execution, self.splits, has_tokenizer=True)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        yield CheckRow("BPE ids", self.tokenizer.vocab_size)

    def train_vqgan(self) -> Iterator[CheckRow]:
        """Train a VQ-GAN from scratch; later stages use the demo model's VQ-GAN if configured."""
        config = replace(self.config, vqgan=replace(self.config.vqgan, init=None))
        execution = replace(self.execution, run=Run("seed0", "", {}, config))
        self.vqgan = make_vqgan(execution, self.splits)
        seconds = execution.seconds["vqgan"]
        yield CheckRow("steps", self.config.vqgan_optim.num_steps / seconds, "steps/s")
        if self.config.vqgan.init == SHIPPED:
            # A bare machine cannot read the configuration next to these weights.
            load_exactly(self.vqgan, read_weights(SHIPPED_VQGAN), family=str(SHIPPED_VQGAN))
            self.vqgan.float()

    def encode_images(self) -> Iterator[CheckRow]:
        """Encode all images to image tokens."""
        encode = partial(image_indices, self.execution, self.vqgan)
        self.parts = Parts(self.tokenizer, self.vqgan, encode)
        splits = (self.splits.with_images(name) for name in ("train", "validation"))
        yield CheckRow(
            "images",
            sum(len(encode(split)) for splits_of_name in splits for split in splits_of_name),
        )

    def train_decoder(self) -> Iterator[CheckRow]:
        """Train the decoder."""
        family = family_of(self.config.model)
        self.decoder = family.build(self.config, self.parts)
        # The decoder has its own folder: a training is named after the folder of its weights.
        weights = self.execution.folder / f"decoder-{digest_of(self.config)[:16]}" / "weights"
        weights.parent.mkdir()
        train_model(self.execution, family, self.decoder, self.splits, self.parts, weights)
        seconds = self.execution.seconds["decoder"]
        yield CheckRow("steps", self.config.optim.num_steps / seconds, "steps/s")

    def score(self) -> Iterator[CheckRow]:
        """Score images and captions; the notes give the scores reached on two CPU cores."""
        model = self.decoder.requires_grad_(False).to(self.execution.hardware.device)
        self.vqgan.to(self.execution.hardware.device)
        capabilities = family_of(self.config.model).open(self.config, model, self.parts)
        cpu_scores = scores_on_cpu()
        scores = run_evaluators(
            self.config,
            capabilities,
            self.splits,
            self.execution.stage,
            runs=self.execution.folders.runs,
        )
        for score in scores:
            cpu_value = cpu_scores.get(score.name)
            note = f"[{score.low:.4g}, {score.high:.4g}]"
            yield CheckRow(
                score.name, score.value, note=f"{note}; CPU {cpu_value}" if cpu_value else note
            )


def scores_on_cpu() -> dict[str, str]:
    """Return the quickstart's scores in the repository, keyed by name."""
    if not QUICKSTART_RESULTS.is_file():
        return {}
    with QUICKSTART_RESULTS.open(encoding="utf-8", newline="") as file:
        return next(csv.DictReader(file))
