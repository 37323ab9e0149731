"""The process of one contestant: ``python -m rudolph.benchmarks.worker``.

Standard input tells it what to be.

The reference has a process of its own kind, ``reference_worker.py``.

To add a contestant, write a ``serving.Contestant``, name it here, and in ``config.MEASURES``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rudolph.benchmarks.config import COMPILED, LIMIT, TRANSFORMERS, WEIGHTS
from rudolph.benchmarks.decoding import Decoding
from rudolph.benchmarks.drawing import Drawing, Upscaling
from rudolph.benchmarks.peers import Transformers
from rudolph.benchmarks.roofline import Limit
from rudolph.benchmarks.serving import Contestant, serve
from rudolph.benchmarks.subject import Subject, read_subject
from rudolph.benchmarks.training import DecoderTraining, Pictures

Make = Callable[[Subject, str, Path], Contestant]

DECODING: dict[str, Make] = {
    LIMIT: Limit,
    TRANSFORMERS: Transformers,
    **dict.fromkeys((*WEIGHTS, *COMPILED), Decoding),
}
CONTESTANTS: dict[str, dict[str, Make]] = {
    "decode": DECODING,
    "train": {LIMIT: Limit, "float32": DecoderTraining, "bfloat16": DecoderTraining},
    "vqgan": {LIMIT: Limit, "float32": Pictures, "bfloat16": Pictures},
    "upscaler": {LIMIT: Limit, "float32": Upscaling, "bfloat16": Upscaling},
    "pipeline": dict.fromkeys((*WEIGHTS, *COMPILED), Drawing),
    "memory": {name: make for name, make in DECODING.items() if name != LIMIT},
}


def contestant(asked: Mapping[str, Any]) -> Contestant:
    """The contestant that a request names."""
    subject = read_subject(asked["subject"])
    make = CONTESTANTS[subject.speed.measure or ""][asked["contestant"]]
    return make(subject, asked["contestant"], Path(asked["folder"]))


if __name__ == "__main__":
    serve(contestant)
