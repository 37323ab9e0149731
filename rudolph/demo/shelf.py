"""The models of a demo, loaded when first used and shared by all users."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rudolph.generation.clip_ranking import ClipRanker
from rudolph.models.cpu.prepacked_linear import FEW_ROWS
from rudolph.runs.resolve import LoadedModel, Precision, find_folder, open_clip, open_model
from rudolph.runs.sampling import GenerateArguments, SamplingArguments, sampling_of


@dataclass(frozen=True)
class ShelfSettings:
    """Sources of a demo's models.

    Attributes:
        sources: Sources of models, as for ``--model``; the first is the default.
        runs: Folder of all runs.
        uri: Tracking server of MLflow runs.
        dtype: Dtype of all weights; None keeps the stored dtype.
        int8: Whether decoders are stored in int8.
        clip: Source of the CLIP that ranks images; None for no such ranking.
        capacity: Models in memory at once; the least recently used model is dropped.
    """

    sources: Sequence[str]
    runs: Path
    uri: str
    dtype: str | None = None
    int8: bool = False
    clip: str | None = None
    capacity: int = 2


class ModelShelf:
    """Models by source, at most ``capacity`` of them in memory.

    On a CPU, the layout of 16-bit weights depends on the number of rows (``Pipeline.pack``), and
    packed weights cannot be packed again.  Such a model is loaded again if a request needs the
    other layout, so that every sample equals the command's sample.

    Raises:
        ValueError: If a source does not exist.
    """

    def __init__(self, settings: ShelfSettings) -> None:
        self.settings = settings
        self.names = list(dict.fromkeys(settings.sources))
        for name in self.names:
            find_folder(name, runs=settings.runs, uri=settings.uri)
        self.lock = threading.Lock()
        self.loaded: OrderedDict[str, tuple[LoadedModel, bool | None]] = OrderedDict()
        self.clip: ClipRanker | None = None

    def open(self, arguments: SamplingArguments) -> LoadedModel:
        """Return the model that the arguments name, packed as the command would pack it.

        Raises:
            ValueError: If the model is not one of this demo or cannot be loaded.
        """
        name = arguments.model
        if name not in self.names:
            raise ValueError(
                f"model: expected one of {', '.join(self.names)}, got {str(name)[:40]!r}"
            )
        with self.lock:
            model, has_few_rows = self.loaded.pop(name, (None, None))
            if model is None or has_few_rows not in (None, _has_few_rows(model, arguments)):
                # Drop others first, so that memory never holds one model too many.
                while len(self.loaded) >= self.settings.capacity:
                    self.loaded.popitem(last=False)
                model, has_few_rows = self._load(arguments)
            self.loaded[name] = model, has_few_rows
        return model

    def _load(self, arguments: SamplingArguments) -> tuple[LoadedModel, bool | None]:
        """Return a packed model, and its kind of layout if that depends on the number of rows."""
        settings = self.settings
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        model = open_model(
            arguments.model,
            runs=settings.runs,
            uri=settings.uri,
            precision=Precision(dtype, settings.int8),
        )
        pipeline = model.pipeline
        is_fixed = pipeline.device.type != "cpu" or (
            pipeline.decoder.final_norm.weight.dtype == torch.float32
        )
        has_few_rows = _has_few_rows(model, arguments)
        base = model.sampling.image
        if not isinstance(arguments, GenerateArguments):
            base = model.sampling.text
        pipeline.pack(arguments.number, sampling_of(base, arguments))
        return model, None if is_fixed else has_few_rows

    def open_ranker(self, model: LoadedModel) -> LoadedModel:
        """Return the model with the demo's CLIP, for requests that rank by it.

        Raises:
            ValueError: If the demo has no CLIP or it cannot be loaded.
        """
        if self.settings.clip is None:
            raise ValueError("rank clip: expected a demo with --clip, got one without")
        with self.lock:
            if self.clip is None:
                self.clip = open_clip(self.settings.clip, runs=self.settings.runs)
                self.clip.clip.to(model.pipeline.device)
        return replace(model, pipeline=replace(model.pipeline, clip=self.clip))


def _has_few_rows(model: LoadedModel, arguments: SamplingArguments) -> bool:
    rows = min(arguments.number, model.pipeline.batch_size)
    if isinstance(arguments, GenerateArguments):
        is_guided = sampling_of(model.sampling.image, arguments).guidance is not None
        rows *= 2 if is_guided else 1
    return rows <= FEW_ROWS
