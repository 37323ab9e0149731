"""Where weights come from: a run, an MLflow run, a released name or a folder.

Every verb that needs weights takes any of these, and ``shipped`` and ``newest``.
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
from rudolph.families.clip import CLIPCapabilities
from rudolph.families.interface import Capabilities
from rudolph.families.rudolph import FILES as RUN_FILES
from rudolph.families.rudolph import RudolphCapabilities
from rudolph.families.vqgan import VQGANCapabilities
from rudolph.files.atomic import rename_damaged, require_disjoint_paths, warn_once, write_atomic
from rudolph.generation.clip_ranking import PLAIN_TEMPLATES, TEMPLATES, ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.models.cpu.int8 import unpack_int8, use_int8
from rudolph.models.layers.native_types import has_native_bfloat16
from rudolph.models.reference import to_reference
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.upscaler import Upscaler
from rudolph.models.vision.clip import CLIP
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import load_exactly, read_weights, weights_error
from rudolph.runs.execution import Hardware, is_finished
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.tracking.artifacts import fetch_run, local_run

Kind = TypeVar("Kind", bound=nn.Module)

# The run that comes with the package, as `rudolph pack` wrote it, and the names of two sources.
SHIPPED_RUN = Path(__file__).parents[1] / "checkpoints" / "demo"
SHIPPED, NEWEST = "shipped", "newest"
# Before the name of an experiment, and after a colon of one of its runs.
OF_EXPERIMENT = "experiment:"
# Where a run leaves the CLIP that it trained.
CLIP_FOLDER = ("checkpoints", "clip")
# How the references draw when nothing else is said.
RELEASED_SAMPLING = {
    "rudolph": SamplingConfig(
        TokenSamplingConfig(top_k=768, top_p=0.99),
        TokenSamplingConfig(temperature=0.9, top_k=64, top_p=0.8),
    ),
    "rudalle": SamplingConfig(TokenSamplingConfig(top_k=2048, top_p=0.995)),
}


@dataclass(frozen=True)
class Precision:
    """How weights are held: ``dtype`` None is the file's own, ``int8`` is for decoder layers."""

    dtype: torch.dtype | None = None
    int8: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline, how it draws unless it is told otherwise, and what it is called."""

    pipeline: Pipeline
    sampling: SamplingConfig
    image_size: int
    name: str


def open_model(
    source: str, *, runs: Path, uri: str, precision: Precision | None = None
) -> LoadedModel:
    """The pipeline of a source.

    Args:
        source: a run's folder, an MLflow run's id, a released name, a folder of weights,
            ``shipped`` or ``newest``.
        runs: the folder of all runs.
        uri: the tracking server that is asked for an MLflow run.

    Raises:
        ValueError: in one line, with what to do.
    """
    precision = precision or Precision()
    folder = find_folder(source, runs=runs, uri=uri)
    found = (_of_run if is_run(folder) else _of_reference)(folder, precision)
    device = Hardware().device
    images = None
    if precision.dtype not in (None, torch.float32) and device.type == "cpu":
        # Processors convolve in bfloat16 where they have any 16 bits.
        images = torch.bfloat16 if has_native_bfloat16() else torch.float32
    found.pipeline.to(device, image_dtype=images)
    return found


def find_folder(source: str, *, runs: Path, uri: str) -> Path:
    """The folder of a source on this disk; an MLflow run is fetched."""
    if source == SHIPPED:
        return SHIPPED_RUN
    if source == NEWEST:
        return newest_run(runs)
    if source.startswith(OF_EXPERIMENT):
        return run_of_experiment(source.removeprefix(OF_EXPERIMENT), runs)
    if re.fullmatch(r"[0-9a-f]{32}", source) and not Path(source).exists():
        here = local_run(source, runs)
        return here or fetched_run(source, uri, runs / ".cache" / f"mlflow-{source}")
    if not Path(source).exists() and not store.is_released(source) and "/" in source:
        raise ValueError(f"{source}: no such folder")
    return store.locate(source)


def fetched_run(run_id: str, uri: str, folder: Path) -> Path:
    """Return the folder of an MLflow run in the cache; a damaged one is fetched again."""
    paths = sorted((folder / "checkpoints").rglob("*.safetensors"))
    faults = [f"{path}: damaged ({fault})" for path in paths if (fault := weights_error(path))]
    if (folder / "config.yaml").is_file():
        try:
            read_run(folder / "config.yaml")
        except ValueError as error:
            faults.append(str(error))
    if faults:
        aside = rename_damaged(folder)
        warn_once(f"{faults[0]}; renamed {aside.name}, the run is fetched again")
    return fetch_run(run_id, uri, folder)


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def newest_run(runs: Path) -> Path:
    """The run that finished last."""
    found = (
        path
        for path in runs.rglob("summary.json")
        if not any(part.startswith(".") for part in path.relative_to(runs).parts)
    )
    summaries = sorted(found, key=lambda path: path.stat().st_mtime)
    for path in reversed(summaries):
        folder = path.parent
        if (folder / "checkpoints" / RUN_FILES[0]).is_file() and is_finished(folder):
            return folder
    raise ValueError(f"{runs}: no finished run; `make quickstart` trains one, or give --model")


def run_of_experiment(name: str, runs: Path) -> Path:
    """Return the newest finished run of an experiment: ``quickstart`` or ``emoji/emoji_64:seed1``.

    Raises:
        ValueError: when no run has finished, or several have and none is named.
    """
    experiment, _, run = name.partition(":")
    folders = sorted((runs / experiment).glob("*/summary.json"), key=lambda it: it.stat().st_mtime)
    finished = {path.parent.name.rpartition("-")[0]: path.parent for path in folders}
    finished = {name: folder for name, folder in finished.items() if is_finished(folder)}
    if run and run in finished:
        return finished[run]
    if not finished or run:
        known = f"; finished are {', '.join(sorted(finished))}" if finished else ""
        raise ValueError(
            f"experiment:{name}: no finished run in {runs / experiment}{known}. "
            f"`rudolph run experiments/{experiment}.yaml` trains it"
        )
    if len(finished) > 1:
        names = ", ".join(f"experiment:{experiment}:{each}" for each in sorted(finished))
        raise ValueError(f"experiment:{name}: expected one run, got {len(finished)}. Name {names}")
    return next(iter(finished.values()))


def load_run(folder: Path) -> tuple[Pipeline, RunConfig]:
    """The trained parts of a run's folder and its configuration.

    Raises:
        ValueError: when the folder holds no finished training.
    """
    checkpoints = folder / "checkpoints"
    for name in RUN_FILES:
        if not (checkpoints / name).is_file():
            raise ValueError(f"{folder}: not a trained run, it lacks checkpoints/{name}")
    config = read_run(folder / "config.yaml")
    vqgan = VQGAN(config.vqgan)
    decoder = MaskedDecoder(config.decoder.architecture, config.sequence_layout, config.vocabulary)
    for part, name in ((decoder, RUN_FILES[0]), (vqgan, RUN_FILES[1])):
        tensors = read_weights(checkpoints / name)
        load_exactly(part, unpack_int8(tensors), family=str(checkpoints / name))
        # A run that was packed holds 16 bits, or 8.
        part.float()
    return Pipeline(Tokenizer(checkpoints / RUN_FILES[2]), vqgan, decoder), config


def _of_run(folder: Path, precision: Precision) -> LoadedModel:
    pipeline, config = load_run(folder)
    pipeline.decoder.to(precision.dtype or torch.float32)
    if precision.int8:
        layers = pipeline.decoder.layers
        weights = layers.state_dict()
        use_int8(layers)
        layers.load_state_dict(weights)
    name = SHIPPED if folder == SHIPPED_RUN else str(folder)
    return LoadedModel(pipeline, config.sampling, config.data.image_size, name)


def _of_reference(folder: Path, precision: Precision) -> LoadedModel:
    """A released decoder, or one in a folder of its own, with the VQ-GAN and BPE that it needs."""
    family, _ = store.read_config(folder)
    if family not in RELEASED_SAMPLING:
        raise ValueError(f"{folder}: holds a {family} model, which draws no images")
    beside = folder / store.TOKENIZER_FILE
    bpe = beside if beside.is_file() else store.locate(TOKENIZER) / store.TOKENIZER_FILE
    vqgan = store.load_weights(_vqgan_beside(folder), dtype=precision.dtype)
    decoder = store.load_weights(folder, dtype=precision.dtype, int8=precision.int8)
    assert isinstance(vqgan, VQGAN) and isinstance(decoder, MaskedDecoder)
    pipeline = Pipeline(Tokenizer(bpe), vqgan, decoder)
    size = decoder.layout.image_tokens_per_dim * vqgan.config.factor
    return LoadedModel(pipeline, RELEASED_SAMPLING[family], size, folder.name)


def export_reference(folder: Path, target: Path, *, has_pickle: bool) -> Iterator[str]:
    """Write the parts of a source as the reference's packages load them; a line for each.

    A part that the reference cannot express is left out and said.

    Args:
        has_pickle: ``pytorch_model.bin`` as well, which the old packages read.

    Raises:
        ValueError: for a target that meets the source.
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
    for place, model in parts.items():
        try:
            family, config, tensors = to_reference(model)
        except ValueError as error:
            yield f"{type(model).__name__} is left out: {error}"
            continue
        pickled = place / "pytorch_model.bin"
        if not has_pickle and store.is_exported(place):
            # It would hold the weights of an earlier call.
            pickled.unlink(missing_ok=True)
        store.write_checkpoint(
            place, tensors, family=family, config=config, origin={"from": str(folder)}
        )
        if has_pickle:
            write_atomic(pickled, partial(torch.save, tensors))
        yield f"{place}: {family}, {len(tensors)} tensors"


def open_weights(source: str, kind: type[Kind], *, runs: Path, uri: str) -> Kind:
    """Return the model of class ``kind`` that a source has, on the CPU.

    Raises:
        ValueError: when the source has a model of another class.
    """
    folder = find_folder(source, runs=runs, uri=uri)
    if not is_run(folder):
        return _checked(store.load_weights(folder), kind, source)
    if kind is CLIP:
        return _checked(open_clip(str(folder)).clip, kind, source)
    return _checked(load_run(folder)[0].decoder, kind, source)


def open_run(folder: Path) -> tuple[Capabilities, RunConfig]:
    """Return the capabilities of a finished run's model, on this device, and its configuration."""
    config, device = read_run(folder / "config.yaml"), Hardware().device
    if config.model.family == "rudolph":
        pipeline, _ = load_run(folder)
        return RudolphCapabilities(pipeline.to(device)), config
    if config.model.family == "clip":
        ranker = open_clip(str(folder))
        ranker.clip.to(device)
        return CLIPCapabilities(ranker), config
    vqgan = VQGAN(config.vqgan)
    path = folder / "checkpoints" / RUN_FILES[1]
    load_exactly(vqgan, read_weights(path), family=str(path))
    return VQGANCapabilities(vqgan.eval().to(device)), config


def open_vqgan(source: str, *, runs: Path, uri: str) -> VQGAN:
    """The VQ-GAN of a source, on the CPU; of a released decoder the one that it is used with."""
    folder = find_folder(source, runs=runs, uri=uri)
    if is_run(folder):
        return _checked(load_run(folder)[0].vqgan, VQGAN, source)
    is_decoder = store.read_config(folder)[0] in RELEASED_SAMPLING
    return _checked(
        store.load_weights(_vqgan_beside(folder) if is_decoder else folder), VQGAN, source
    )


def _vqgan_beside(folder: Path) -> Path | str:
    """Return where the VQ-GAN of a decoder in the reference's format is."""
    own = folder / "vqgan"
    return own if own.is_dir() else IMAGE_TOKENIZER


def find_tokenizer(source: str, *, runs: Path, uri: str) -> Path:
    """The ``bpe.model`` of a source, or the file itself."""
    if Path(source).is_file() or source.endswith(".model"):
        return Path(source)
    folder = find_folder(source, runs=runs, uri=uri)
    place = folder / "checkpoints" if is_run(folder) else folder
    path = place / store.TOKENIZER_FILE
    return path if path.is_file() else store.locate(TOKENIZER) / store.TOKENIZER_FILE


def open_clip(source: str, *, runs: Path = Path("runs")) -> ClipRanker:
    """Return a CLIP with its tokenizer: of a release, a folder, a run or an experiment's run.

    Args:
        runs: where the runs of ``experiment:NAME`` lie.
    """
    if source.startswith(OF_EXPERIMENT):
        source = str(run_of_experiment(source.removeprefix(OF_EXPERIMENT), runs))
    is_trained_here = is_run(Path(source))
    folder = Path(source, *CLIP_FOLDER) if is_trained_here else store.locate(source)
    if is_trained_here and not folder.is_dir():
        raise ValueError(
            f"{source}: not a run that trained a CLIP, it lacks {'/'.join(CLIP_FOLDER)}"
        )
    bpe = folder / store.TOKENIZER_FILE
    if not bpe.is_file():
        raise ValueError(f"{folder}: a CLIP needs its own {store.TOKENIZER_FILE} beside it")
    templates = PLAIN_TEMPLATES if is_trained_here else TEMPLATES
    model = _checked(store.load_weights(folder), CLIP, source)
    return ClipRanker(model, Tokenizer(bpe), templates=templates)


def open_upscaler(source: str) -> Upscaler:
    """An upscaler of a released name or a folder."""
    return _checked(store.load_weights(source), Upscaler, source)


def _checked(model: nn.Module, kind: type[Kind], source: str) -> Kind:
    if not isinstance(model, kind):
        raise ValueError(f"{source}: must be a {kind.__name__}, got a {type(model).__name__}")
    return model
