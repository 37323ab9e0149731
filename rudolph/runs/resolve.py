"""Resolution of weight sources: a run, an MLflow run, a released name or a folder.

Every command that needs weights accepts any of these, and also ``shipped`` and ``newest``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from rudolph.checkpoints import store
from rudolph.checkpoints.releases import IMAGE_TOKENIZER, TOKENIZER
from rudolph.config.run import RunConfig, SamplingConfig, read_run
from rudolph.families.interface import Capabilities
from rudolph.families.registry import family_of
from rudolph.families.rudolph import FILES as RUN_FILES
from rudolph.families.rudolph import RudolphFamily
from rudolph.files.atomic import rename_damaged, require_disjoint_paths, warn_once, write_atomic
from rudolph.files.settings import did_you_mean
from rudolph.generation.clip_ranking import PLAIN_TEMPLATES, TEMPLATES, ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.models.cpu.int8 import use_int8
from rudolph.models.layers.native_types import has_native_bfloat16
from rudolph.models.reference import to_reference
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.upscaler import Upscaler
from rudolph.models.vision.clip import CLIP
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import weights_error
from rudolph.reports.experiment_names import experiments_with_runs
from rudolph.runs.execution import Hardware, is_finished
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.tracking.artifacts import fetch_run, local_run
from rudolph.tracking.run_directory import CHECKPOINTS, RunDirectory, started_runs

Kind = TypeVar("Kind", bound=nn.Module)

# Folder of the packed run that is part of the package, and the names of two sources.
SHIPPED_RUN = Path(__file__).parents[1] / "checkpoints" / "demo"
SHIPPED, NEWEST = "shipped", "newest"
# Prefix of a source ``experiment:NAME`` or ``experiment:NAME:RUN``.
OF_EXPERIMENT = "experiment:"
# Folder of a trained CLIP within a run.
CLIP_FOLDER = (CHECKPOINTS, "clip")
# Default sampling settings of the reference implementations.
RELEASED_SAMPLING = {
    "rudolph": SamplingConfig(
        TokenSamplingConfig(top_k=768, top_p=0.99),
        TokenSamplingConfig(temperature=0.9, top_k=64, top_p=0.8),
    ),
    "rudalle": SamplingConfig(TokenSamplingConfig(top_k=2048, top_p=0.995)),
}


@dataclass(frozen=True)
class Precision:
    """Precision of loaded weights.

    Attributes:
        dtype: Dtype of the weights; None for the file's own dtype.
        int8: Store the decoder's layers in int8.
    """

    dtype: torch.dtype | None = None
    int8: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline with its defaults.

    Attributes:
        pipeline: Decoder, VQ-GAN and tokenizer.
        sampling: Default sampling settings.
        image_size: Height and width of generated images, in pixels.
        name: Name for messages and records.
    """

    pipeline: Pipeline
    sampling: SamplingConfig
    image_size: int
    name: str


def open_model(
    source: str, *, runs: Path, uri: str, precision: Precision | None = None
) -> LoadedModel:
    """Load the pipeline of a source on this machine's device.

    Args:
        source: A run's folder, an MLflow run id, a released name, a folder of weights,
            ``shipped``, ``newest`` or ``experiment:NAME``.
        runs: Folder of all runs.
        uri: Tracking server of an MLflow run.
        precision: Precision of the weights.

    Raises:
        ValueError: If the source has no such model; the message says what to do.
    """
    precision = precision or Precision()
    folder = find_folder(source, runs=runs, uri=uri)
    model = (_load_run_model if is_run(folder) else _load_release)(folder, precision)
    device = Hardware().device
    image_dtype = None
    if precision.dtype not in (None, torch.float32) and device.type == "cpu":
        # On CPUs, bfloat16 is the only 16-bit dtype with native convolutions.
        image_dtype = torch.bfloat16 if has_native_bfloat16() else torch.float32
    model.pipeline.to(device, image_dtype=image_dtype)
    return model


def find_folder(source: str, *, runs: Path, uri: str) -> Path:
    """Return the local folder of a source; download an MLflow run.

    Raises:
        ValueError: If the source does not exist.
    """
    if source == SHIPPED:
        return SHIPPED_RUN
    if source == NEWEST:
        return newest_run(runs)
    if source.startswith(OF_EXPERIMENT):
        return run_of_experiment(source.removeprefix(OF_EXPERIMENT), runs)
    if re.fullmatch(r"[0-9a-f]{32}", source) and not Path(source).exists():
        local_folder = local_run(source, runs)
        return local_folder or fetched_run(source, uri, runs / ".cache" / f"mlflow-{source}")
    if not Path(source).exists() and not store.is_released(source):
        if source in experiments_with_runs(runs):
            raise ValueError(f"{source}: no such folder; did you mean {OF_EXPERIMENT}{source}?")
        if "/" in source:
            raise ValueError(f"{source}: no such folder")
    return store.locate(source)


def fetched_run(run_id: str, uri: str, folder: Path) -> Path:
    """Return the cached folder of an MLflow run; download it if missing or damaged."""
    directory = RunDirectory(folder)
    paths = directory.weights()
    faults = [f"{path}: damaged ({fault})" for path in paths if (fault := weights_error(path))]
    if directory.config.is_file():
        try:
            read_run(directory.config)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        renamed = rename_damaged(folder)
        warn_once(f"{faults[0]}; renamed {renamed.name}; downloading the run again")
    return fetch_run(run_id, uri, folder)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return RunDirectory(folder).config.is_file()


def newest_run(runs: Path) -> Path:
    """Return the folder of the run that finished last and has a decoder.

    Raises:
        ValueError: If no run has finished.
    """
    started = [
        run
        for run in started_runs(runs, "**")
        if not any(part.startswith(".") for part in run.path.relative_to(runs).parts)
    ]
    for run in sorted(started, key=RunDirectory.summary_time, reverse=True):
        if (run.checkpoints / RUN_FILES[0]).is_file() and is_finished(run.path):
            return run.path
    raise ValueError(
        f"{runs}: expected a finished run, got none. Train one with `make quickstart`, or give "
        "--model"
    )


def run_of_experiment(name: str, runs: Path) -> Path:
    """Return the newest finished run of an experiment.

    Examples of names are ``quickstart`` and ``emoji/emoji_64:seed1``.

    Raises:
        ValueError: If no run has finished, or if several have finished and the name selects none
            of them.
    """
    experiment, _, run = name.partition(":")
    started = sorted(started_runs(runs / experiment), key=RunDirectory.summary_time)
    folders = [directory.path for directory in started]
    finished = {folder.name.rpartition("-")[0]: folder for folder in folders}
    finished = {name: folder for name, folder in finished.items() if is_finished(folder)}
    if run and run in finished:
        return finished[run]
    if not finished or run:
        known = f", only {', '.join(sorted(finished))}" if finished else ""
        others = experiments_with_runs(runs) - {experiment}
        file = Path("experiments", f"{experiment}.yaml")
        # A file that exists is no misspelling, even if another experiment has a similar name.
        closest = "" if file.is_file() else did_you_mean(experiment, others)
        advice = closest or f". Train it with `rudolph run {file.as_posix()}`"
        raise ValueError(
            f"experiment:{name}: no finished run in {runs / experiment}{known}{advice}"
        )
    if len(finished) > 1:
        names = ", ".join(f"experiment:{experiment}:{run_name}" for run_name in sorted(finished))
        raise ValueError(
            f"experiment:{name}: expected one run, got {len(finished)}. Choose from {names}"
        )
    return next(iter(finished.values()))


def load_run(folder: Path) -> tuple[Pipeline, RunConfig]:
    """Load the trained decoder, VQ-GAN and tokenizer of a run, on the CPU in float32.

    Returns:
        The pipeline and the configuration of the run.

    Raises:
        ValueError: If the folder holds no finished training.
    """
    directory = RunDirectory(folder)
    checkpoints = directory.checkpoints
    for name in RUN_FILES:
        if not (checkpoints / name).is_file():
            raise ValueError(f"{folder}: expected a trained run, got no {CHECKPOINTS}/{name}")
    config = read_run(directory.config)
    decoder, parts = RudolphFamily().restore(checkpoints, config)
    assert parts.tokenizer is not None and parts.vqgan is not None
    return Pipeline(parts.tokenizer, parts.vqgan, decoder), config


def _load_run_model(folder: Path, precision: Precision) -> LoadedModel:
    pipeline, config = load_run(folder)
    pipeline.decoder.to(precision.dtype or torch.float32)
    if precision.int8:
        layers = pipeline.decoder.layers
        weights = layers.state_dict()
        use_int8(layers)
        layers.load_state_dict(weights)
    name = SHIPPED if folder == SHIPPED_RUN else str(folder)
    return LoadedModel(pipeline, config.sampling, config.data.image_size, name)


def _load_release(folder: Path, precision: Precision) -> LoadedModel:
    """Load a decoder in the reference's format, with the VQ-GAN and tokenizer that it needs."""
    family, _ = store.read_config(folder)
    if family not in RELEASED_SAMPLING:
        raise ValueError(f"{folder}: expected a model that generates images, got a {family} model")
    own_bpe = folder / store.TOKENIZER_FILE
    bpe = own_bpe if own_bpe.is_file() else store.locate(TOKENIZER) / store.TOKENIZER_FILE
    vqgan = store.load_weights(_vqgan_source(folder), dtype=precision.dtype)
    decoder = store.load_weights(folder, dtype=precision.dtype, int8=precision.int8)
    assert isinstance(vqgan, VQGAN) and isinstance(decoder, MaskedDecoder)
    pipeline = Pipeline(Tokenizer(bpe), vqgan, decoder)
    size = decoder.layout.image_tokens_per_dim * vqgan.config.factor
    return LoadedModel(pipeline, RELEASED_SAMPLING[family], size, folder.name)


def export_reference(folder: Path, target: Path, *, has_pickle: bool) -> Iterator[str]:
    """Write the parts of a source in the format of the reference's packages.

    Parts that the reference cannot express are left out.

    Args:
        folder: Folder of a run or of weights.
        target: Folder to write.
        has_pickle: Also write ``pytorch_model.bin``, which the old packages read.

    Yields:
        One line per part: its folder, or why it is left out.

    Raises:
        ValueError: If the target overlaps the source.
    """
    require_disjoint_paths(target, folder, "folder")
    if is_run(folder):
        pipeline, _ = load_run(folder)
        parts: dict[Path, nn.Module] = {
            target: pipeline.decoder,
            target / "vqgan": pipeline.vqgan,
        }
        target.mkdir(parents=True, exist_ok=True)
        pipeline.tokenizer.save(target / store.TOKENIZER_FILE)
    else:
        parts = {target: store.load_weights(folder)}
    for folder_of_part, model in parts.items():
        try:
            family, config, tensors = to_reference(model)
        except ValueError as error:
            yield f"{type(model).__name__}: left out ({error})"
            continue
        pickle_path = folder_of_part / "pytorch_model.bin"
        if not has_pickle and store.is_exported(folder_of_part):
            # Otherwise the file would still hold the weights of an earlier call.
            pickle_path.unlink(missing_ok=True)
        store.write_checkpoint(
            folder_of_part, tensors, family=family, config=config, origin={"from": str(folder)}
        )
        if has_pickle:
            write_atomic(pickle_path, partial(torch.save, tensors))
        yield f"{folder_of_part}: {family}, {len(tensors)} tensors"


def open_weights(source: str, kind: type[Kind], *, runs: Path, uri: str) -> Kind:
    """Load the model of class ``kind`` from a source, on the CPU.

    Raises:
        ValueError: If the source has a model of another class.
    """
    folder = find_folder(source, runs=runs, uri=uri)
    if not is_run(folder):
        return _require_kind(store.load_weights(folder), kind, source)
    directory = RunDirectory(folder)
    config = read_run(directory.config)
    model, _ = family_of(config.model).restore(directory.checkpoints, config)
    return _require_kind(model, kind, source)


def open_run(folder: Path) -> tuple[Capabilities, RunConfig]:
    """Return the capabilities of a finished run's model, on this device, and its configuration."""
    directory, device = RunDirectory(folder), Hardware().device
    config = read_run(directory.config)
    family = family_of(config.model)
    model, parts = family.restore(directory.checkpoints, config)
    if parts.vqgan is not None:
        parts.vqgan.to(device)
    return family.open(config, model.to(device), parts), config


def open_vqgan(source: str, *, runs: Path, uri: str) -> VQGAN:
    """Load the VQ-GAN of a source on the CPU; for a released decoder, load its VQ-GAN."""
    folder = find_folder(source, runs=runs, uri=uri)
    if is_run(folder):
        return _require_kind(load_run(folder)[0].vqgan, VQGAN, source)
    is_decoder = store.read_config(folder)[0] in RELEASED_SAMPLING
    return _require_kind(
        store.load_weights(_vqgan_source(folder) if is_decoder else folder), VQGAN, source
    )


def _vqgan_source(folder: Path) -> Path | str:
    """Return the folder or name of the VQ-GAN that a decoder in the reference's format needs."""
    own_vqgan = folder / "vqgan"
    return own_vqgan if own_vqgan.is_dir() else IMAGE_TOKENIZER


def find_tokenizer(source: str, *, runs: Path, uri: str) -> Path:
    """Return the path of a source's ``bpe.model``, or the source if it is such a file."""
    if Path(source).is_file() or source.endswith(".model"):
        return Path(source)
    folder = find_folder(source, runs=runs, uri=uri)
    folders = [folder]
    if is_run(folder):
        folders = [folder / CHECKPOINTS, folder.joinpath(*CLIP_FOLDER)]
    for parent in folders:
        if (parent / store.TOKENIZER_FILE).is_file():
            return parent / store.TOKENIZER_FILE
    return store.locate(TOKENIZER) / store.TOKENIZER_FILE


def open_clip(source: str, *, runs: Path = Path("runs")) -> ClipRanker:
    """Load a CLIP with its tokenizer.

    Args:
        source: A released name, a folder, a run or ``experiment:NAME``.
        runs: Folder with the runs of ``experiment:NAME``.

    Raises:
        ValueError: If the source has no CLIP or no tokenizer.
    """
    if source.startswith(OF_EXPERIMENT):
        source = str(run_of_experiment(source.removeprefix(OF_EXPERIMENT), runs))
    is_trained_here = is_run(Path(source))
    folder = Path(source, *CLIP_FOLDER) if is_trained_here else store.locate(source)
    if is_trained_here and not folder.is_dir():
        raise ValueError(
            f"{source}: expected a run that trained a CLIP, got no {'/'.join(CLIP_FOLDER)}"
        )
    bpe = folder / store.TOKENIZER_FILE
    if not bpe.is_file():
        raise ValueError(f"{folder}: expected a CLIP with its {store.TOKENIZER_FILE}, got none")
    templates = PLAIN_TEMPLATES if is_trained_here else TEMPLATES
    model = _require_kind(store.load_weights(folder), CLIP, source)
    return ClipRanker(model, Tokenizer(bpe), templates=templates)


def open_upscaler(source: str) -> Upscaler:
    """Load an upscaler by released name or from a folder."""
    return _require_kind(store.load_weights(source), Upscaler, source)


def _require_kind(model: nn.Module, kind: type[Kind], source: str) -> Kind:
    if not isinstance(model, kind):
        raise ValueError(f"{source}: expected a {kind.__name__}, got a {type(model).__name__}")
    return model
