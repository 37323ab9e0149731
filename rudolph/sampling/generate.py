"""From a prompt to tokens: one loop for every segment and task.

The prompt is computed once for all samples of it; then one position at a time with a static
key-value cache, through the segment's part of the head alone.

Shapes: B prompts, S samples of each, N new tokens, T tokens, Vs the segment's vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rudolph.models.decoder import KeyValueCache, MaskedDecoder
from rudolph.sampling.filters import TokenSamplingConfig, draw, guided
from rudolph.sequence.layout import EOS, PAD


def uniform_numbers(seeds: Sequence[int], num_new: int) -> Tensor:
    """Numbers in [0, 1) for each draw, ``(len(seeds), N)``: one stream a sample, by its seed."""
    rows = [
        torch.rand(num_new, generator=torch.Generator().manual_seed(seed % 2**63))
        for seed in seeds
    ]
    return torch.stack(rows)


@torch.inference_mode()
def generate_image(
    model: MaskedDecoder,
    left: Tensor,
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    unconditional: Tensor | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Image indices ``(B * S, I)`` for left texts ``(B, l)``; S is ``len(seeds) / B``.

    Args:
        seeds: one for each sample, the samples of a prompt next to each other.
        unconditional: ``(l,)``, the left text that guidance leads away from.
        on_token: called with the number of tokens done.

    Raises:
        ValueError: when guidance is set and there is no unconditional text.
    """
    num_samples = len(seeds) // len(left)
    num_new = model.layout.num_image_tokens
    prompts = left
    if config.guidance is not None:
        if unconditional is None:
            raise ValueError("guidance needs an unconditional left text")
        prompts = torch.cat([left, unconditional.expand_as(left)])

    def head(hidden: Tensor) -> Tensor:
        logits = model.image_logits(hidden)[:, : model.vocabulary.codebook_size]
        if config.guidance is None:
            return logits
        conditional, rest = logits.chunk(2)
        return guided(conditional, rest, config.guidance)

    copies = 1 if config.guidance is None else 2
    return _generate(
        model,
        prompts,
        num_samples=num_samples,
        head=head,
        config=config,
        uniform=uniform_numbers(seeds, num_new),
        copies=copies,
        on_token=on_token,
    )


@torch.inference_mode()
def generate_right_text(
    model: MaskedDecoder,
    tokens: Tensor,
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Right-text ids ``(B * S, N)`` after ``tokens`` (B, T), which end inside the right text.

    What follows the first ``EOS`` is padding; task tokens and padding ids are never drawn.
    """
    num_new = model.layout.length - tokens.shape[1]

    def head(hidden: Tensor) -> Tensor:
        logits = model.text_logits(hidden)[:, : model.vocabulary.bpe_size].clone()
        logits[:, PAD] = -torch.inf
        return logits

    drawn = _generate(
        model,
        tokens,
        num_samples=len(seeds) // len(tokens),
        head=head,
        config=config,
        uniform=uniform_numbers(seeds, num_new),
        stop=EOS,
        on_token=on_token,
    )
    is_after_end = (drawn == EOS).cumsum(1) - (drawn == EOS).long() > 0
    return drawn.masked_fill(is_after_end, PAD)


def _generate(
    model: MaskedDecoder,
    prompts: Tensor,
    *,
    num_samples: int,
    head: Callable[[Tensor], Tensor],
    config: TokenSamplingConfig,
    uniform: Tensor,
    copies: int = 1,
    stop: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """The loop: ``uniform`` (B * S, N) decides the draws; ``copies`` rows of a sample see them."""
    like = model.to_logits.weight
    cache = KeyValueCache(model.config, model.layout, batch_size=len(prompts), like=like)
    hidden = model.hidden(prompts, cache)[:, -1].repeat_interleave(num_samples, dim=0)
    cache = cache.repeat(num_samples)
    uniform = uniform.to(like.device)
    tokens = torch.zeros_like(uniform, dtype=torch.long)
    num_new = uniform.shape[1]
    has_stopped = torch.zeros(len(uniform), dtype=torch.bool, device=like.device)
    for step in range(num_new):
        tokens[:, step] = draw(head(hidden), config, uniform[:, step])
        if on_token is not None:
            on_token(step + 1)
        has_stopped |= tokens[:, step] == (-1 if stop is None else stop)
        if step + 1 == num_new or has_stopped.all():
            break
        new = tokens[:, step : step + 1].repeat(copies, 1)
        hidden = model.hidden(new, cache)[:, -1]
    return tokens
