"""The scale of an experiment in one line: parameters, steps, samples, tokens, pixels and seeds."""

from collections.abc import Callable, Iterable, Sequence

import torch

from rudolph.config.run import RunConfig
from rudolph.families.registry import family_of
from rudolph.models.vqgan.model import VQGAN


def scale_of(configs: Sequence[RunConfig]) -> str:
    """Return the scale of the runs of an experiment; values that differ are given as a range.

    Nothing is allocated: models are built on the meta device.
    """
    stages = dict.fromkeys(family_of(config.model).stage for config in configs)
    parts = [
        f"{stage} {_range(_counts(configs, stage), _millions)} parameters" for stage in stages
    ]
    with_vqgan = [config for config in configs if config.needs_vqgan]
    if with_vqgan and "vqgan" not in stages:
        parts.append(
            f"VQ-GAN {_range({_vqgan_parameters(each) for each in with_vqgan}, _millions)}"
        )
    return "; ".join([", ".join(parts), *_training(configs), *_seeds(configs)])


def _training(configs: Sequence[RunConfig]) -> list[str]:
    if configs[0].speed.workload is not None:
        return [f"batch size {_range({each.speed.batch_size for each in configs}, str)}"]
    sides = _range({each.data.image_size for each in configs}, str)
    trained = [each for each in configs if "optim" in each.trainings]
    if not trained:
        return [f"no training steps, {sides} px"]
    steps = _range({each.optim.num_steps for each in trained}, lambda number: f"{number:,}")
    batch = _range({each.optim.global_batch_size for each in trained}, str)
    tokens = {
        each.optim.num_steps * each.optim.global_batch_size * each.sequence_layout.length
        for each in trained
        if each.needs_vqgan
    }
    total = f" ({_range(tokens, _millions)} tokens)" if tokens else ""
    return [f"{steps} steps of {batch} samples{total}, {sides} px"]


def _seeds(configs: Sequence[RunConfig]) -> list[str]:
    if configs[0].speed.workload is not None:
        return []
    number = len({config.seed for config in configs})
    return [f"{number} seed{'s' if number > 1 else ''}"]


def _counts(configs: Sequence[RunConfig], stage: str) -> set[int]:
    """Return the parameter counts of the models of one family."""
    own = [config for config in configs if family_of(config.model).stage == stage]
    # A sweep has hundreds of runs of one model.
    distinct = {
        str((each.model, each.layout, each.tokenizer, each.vqgan, each.data.image_size)): each
        for each in own
    }
    counts = set()
    for config in distinct.values():
        with torch.device("meta"):
            model = family_of(config.model).empty(config)
        counts.add(sum(parameter.numel() for parameter in model.parameters()))
    return counts


def _vqgan_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        model = VQGAN(config.vqgan)
    return sum(parameter.numel() for parameter in model.parameters())


def _range(values: Iterable[int], text: Callable[[int], str]) -> str:
    written = [text(value) for value in sorted(values)]
    ends = list(dict.fromkeys((written[0], written[-1])))
    return " to ".join(ends)


def _millions(number: int) -> str:
    """Return a number with three digits.

    >>> _millions(12_600_000), _millions(410_000), _millions(2_700_000_000)
    ('12.6M', '0.41M', '2.7B')
    """
    if number >= 1_000_000_000:
        return f"{number / 1e9:.3g}B"
    return f"{number / 1e6:.3g}M"
