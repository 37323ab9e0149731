"""The scale of an experiment in one line: parameters, steps, samples, tokens, pixels and seeds."""

from collections.abc import Callable, Iterable, Sequence

from rudolph.config.run import RunConfig
from rudolph.families.registry import family_of
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import meta_device


def scale_of(configs: Sequence[RunConfig]) -> str:
    """Return the scale of an experiment's runs; differing values are given as a range.

    Models are built on the meta device, without allocating memory.
    """
    stages = dict.fromkeys(family_of(config.model).stage for config in configs)
    parts = [
        f"{stage} {_range_text(_parameter_counts(configs, stage), _millions)} parameters"
        for stage in stages
    ]
    with_vqgan = [config for config in configs if config.needs_vqgan]
    if with_vqgan and "vqgan" not in stages:
        counts = {_vqgan_parameters(config) for config in with_vqgan}
        parts.append(f"VQ-GAN {_range_text(counts, _millions)}")
    return "; ".join([", ".join(parts), *_training_parts(configs), *_seed_parts(configs)])


def _training_parts(configs: Sequence[RunConfig]) -> list[str]:
    if configs[0].speed.workload is not None:
        return [f"batch size {_range_text({config.speed.batch_size for config in configs}, str)}"]
    sides = _range_text({config.data.image_size for config in configs}, str)
    trained = [config for config in configs if "optim" in config.trainings]
    if not trained:
        return [f"no training steps, {sides} px"]
    steps = _range_text(
        {config.optim.num_steps for config in trained}, lambda number: f"{number:,}"
    )
    batch = _range_text({config.optim.global_batch_size for config in trained}, str)
    tokens = {
        config.optim.num_steps * config.optim.global_batch_size * config.sequence_layout.length
        for config in trained
        if config.needs_vqgan
    }
    total = f" ({_range_text(tokens, _millions)} tokens)" if tokens else ""
    return [f"{steps} steps of {batch} samples{total}, {sides} px"]


def _seed_parts(configs: Sequence[RunConfig]) -> list[str]:
    if configs[0].speed.workload is not None:
        return []
    num_seeds = len({config.seed for config in configs})
    return [f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"]


def _parameter_counts(configs: Sequence[RunConfig], stage: str) -> set[int]:
    """Return the distinct parameter counts of the models of one family."""
    matching = [config for config in configs if family_of(config.model).stage == stage]
    # A sweep may have hundreds of runs of one model.
    distinct = {
        str(
            (config.model, config.layout, config.tokenizer, config.vqgan, config.data.image_size)
        ): config
        for config in matching
    }
    counts = set()
    for config in distinct.values():
        with meta_device():
            model = family_of(config.model).empty(config)
        counts.add(sum(parameter.numel() for parameter in model.parameters()))
    return counts


def _vqgan_parameters(config: RunConfig) -> int:
    with meta_device():
        model = VQGAN(config.vqgan)
    return sum(parameter.numel() for parameter in model.parameters())


def _range_text(values: Iterable[int], to_text: Callable[[int], str]) -> str:
    texts = [to_text(value) for value in sorted(values)]
    ends = list(dict.fromkeys((texts[0], texts[-1])))
    return " to ".join(ends)


def _millions(number: int) -> str:
    """Format a number with three significant digits.

    >>> _millions(12_600_000), _millions(410_000), _millions(2_700_000_000)
    ('12.6M', '0.41M', '2.7B')
    """
    if number >= 1_000_000_000:
        return f"{number / 1e9:.3g}B"
    return f"{number / 1e6:.3g}M"
