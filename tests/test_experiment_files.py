"""The experiment files of the repository: each loads, samples and trains two steps."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rudolph.config.experiment_file import Experiment, load_experiment
from rudolph.config.run import RunConfig
from rudolph.data.examples import TokenBatch
from rudolph.data.splits import Splits, open_dataset
from rudolph.families.documents import DocumentSection
from rudolph.families.interface import ModelSection, Parts
from rudolph.families.registry import family_of
from rudolph.families.vision_language import PartSources
from rudolph.generation.documents import answer_losses
from rudolph.generation.filters import next_probabilities
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.vision.clip import CLIP
from rudolph.models.vqgan.model import VQGAN
from rudolph.sequence.tasks import TASKS
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.decoder import DecoderTraining
from rudolph.training.losses import compute_losses, reduce_losses, segment_means
from rudolph.training.optim import build_optimizers, clip_gradients

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "base")
NAMES = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES]
BATCH = 2


@pytest.fixture(params=FILES, ids=NAMES, scope="module")
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return load_experiment(request.param)


def test_its_runs_ask_different_questions_of_pairs_that_are_there(experiment: Experiment) -> None:
    digests = {run.config.digest for run in experiment.runs}
    assert len(digests) == len(experiment.runs) == len({run.name for run in experiment.runs})
    assert experiment.source, "where does the question come from?"
    for dataset in {name for run in experiment.runs for name in run.config.data.datasets}:
        config = experiment.runs[0].config.data
        if dataset != "manifest":
            assert open_dataset(config, "train", dataset)[0].caption
    metrics = {*experiment.report.table, *experiment.report.effects, *experiment.targets}
    splits = {name for run in experiment.runs for name in run.config.evaluation.splits}
    if experiment.runs[0].config.speed.workload is None:
        assert {metric.rpartition("/")[2] for metric in metrics} <= splits


def test_filters_of_its_runs_leave_something_to_draw(experiment: Experiment) -> None:
    logits = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    for sampling in {run.config.sampling for run in experiment.runs}:
        for config in (sampling.image, sampling.text):
            shares = next_probabilities(logits[0], config, logits[1])
            torch.testing.assert_close(shares.sum(-1), torch.ones(2))


def batch_of(config: RunConfig) -> TokenBatch:
    """Return random tokens as examples of every row of the mixture."""
    layout, vocabulary = config.sequence_layout, config.vocabulary
    generator = torch.Generator().manual_seed(1)
    rows = range(BATCH * len(config.data.mixture))
    sources = torch.tensor([row % len(config.data.mixture) for row in rows])
    own = config.decoder.losses.task_weights
    tasks = [source.task for source in config.data.mixture]
    weights = torch.tensor([list(own.get(task, TASKS[task].weights)) for task in tasks])
    sizes = vocabulary.bpe_size, vocabulary.codebook_size, vocabulary.bpe_size
    tokens = torch.cat(
        [
            torch.randint(1, size, (len(rows), length), generator=generator)
            for size, length in zip(sizes, layout.segment_lengths, strict=True)
        ],
        dim=1,
    )
    return TokenBatch(tokens, tokens, weights[sources], sources, torch.tensor(rows))


def train_two_steps(config: RunConfig) -> list[float]:
    torch.manual_seed(0)
    model = MaskedDecoder(config.decoder.architecture, config.sequence_layout, config.vocabulary)
    module = DecoderTraining(model, config.decoder.losses, config.optim)
    optimizers = build_optimizers(model, config.optim)
    batch, losses = batch_of(config), []
    for _ in range(2):
        found = compute_losses(
            model, batch.tokens, config.decoder.losses, scored=batch.scored, inputs=batch.inputs
        )
        loss = (
            reduce_losses(
                found, config.decoder.losses, weights=batch.weights, sources=batch.sources
            )
            if module.learned is None
            else module.learned(segment_means(found))
        )
        loss.backward()
        clip_gradients(optimizers, config.optim)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def small_worlds(config: RunConfig) -> RunConfig:
    """Return a config with few pairs per dataset and new instead of trained parts."""
    worlds = {
        name: replace(getattr(config.data, name), num_train=80, num_validation=80)
        for name in config.data.datasets
    }
    return replace(config, data=replace(config.data, **worlds), model=new_parts(config.model))


def train_two_steps_on_documents(
    config: RunConfig, splits: Splits, tokenizer: Tokenizer
) -> list[float]:
    """Train two steps of a family that reads documents."""
    family = family_of(config.model)
    needs_vqgan = "vqgan" in family.needs(config.model)
    parts = Parts(tokenizer, VQGAN(config.vqgan) if needs_vqgan else None)
    model = family.build(config, parts)
    examples = family.examples(config, splits, "train", parts)
    reader = family.reader(config, model)
    optimizers, batch, losses = build_optimizers(model, config.optim), examples.batch(range(8)), []
    for _ in range(2):
        loss = answer_losses(reader, batch)[0].mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def new_parts(section: ModelSection) -> ModelSection:
    """Return a ``model`` section that starts from no run."""
    without = {"parts": PartSources()} if hasattr(section, "parts") else {}
    return replace(section, init=None, **without)


def test_every_reader_of_documents_that_it_trains_learns_in_two_steps(
    experiment: Experiment, tmp_path: Path
) -> None:
    different = {
        str((run.config.model, run.config.optim, run.config.data, run.config.vqgan)): run.config
        for run in experiment.runs
        if isinstance(run.config.model, DocumentSection) and "optim" in run.config.trainings
    }
    opened: dict[str, tuple[Splits, Tokenizer]] = {}
    for config in map(small_worlds, different.values()):
        key = str((config.data, config.tokenizer))
        if key not in opened:
            splits = Splits(config.data, tmp_path)
            pairs = splits.all("train")
            texts = [text for split in pairs for text in (*split.captions, *split.questions)]
            size, path = config.tokenizer.vocab_size, tmp_path / f"{len(opened)}.model"
            opened[key] = splits, Tokenizer.train(filter(None, texts), vocab_size=size, path=path)
        first, second = train_two_steps_on_documents(config, *opened[key])
        assert math.isfinite(first) and second < first


def test_every_decoder_that_it_trains_learns_in_two_steps(experiment: Experiment) -> None:
    different = {}
    for run in experiment.runs:
        config = run.config
        if config.model.family == "clip":
            model = CLIP(config.model.architecture)
            assert sum(parameter.numel() for parameter in model.parameters()) > 0
        elif config.model.family == "rudolph" and "optim" in config.trainings:
            decides = str((config.model, config.optim, config.layout, config.vocabulary))
            different[decides] = config
    for config in different.values():
        first, second = train_two_steps(config)
        assert math.isfinite(first) and second < first
