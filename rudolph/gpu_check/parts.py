"""The parts of the check by name.

To add a part, write a function ``(Sizes) -> Iterator[Case]`` and name it here and in
``plan.PLAN``.
"""

from collections.abc import Callable, Iterator
from functools import partial

from rudolph.gpu_check.compiling import compile_cases
from rudolph.gpu_check.consistency import mask_cases, precision_cases, step_cases
from rudolph.gpu_check.decoding import decoding_cases
from rudolph.gpu_check.golden import golden
from rudolph.gpu_check.images import image_cases
from rudolph.gpu_check.quickstart import quickstart_cases
from rudolph.gpu_check.resuming import resume_cases
from rudolph.gpu_check.rows import Case
from rudolph.gpu_check.sizes import Sizes
from rudolph.gpu_check.timing import device_limits
from rudolph.gpu_check.training import adam8bit_cases, training_cases

CHECK_PARTS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "limits": device_limits,
    "golden": golden,
    "decoding_steps": step_cases,
    "precision": precision_cases,
    "masks": mask_cases,
    "resume": resume_cases,
    "compile": compile_cases,
    "train_350m": partial(training_cases, "350m"),
    "train_1.3b": partial(training_cases, "1.3b"),
    "decode_350m": partial(decoding_cases, "350m"),
    "decode_1.3b": partial(decoding_cases, "1.3b"),
    "images": image_cases,
    "quickstart": quickstart_cases,
    "adam8bit": adam8bit_cases,
}
