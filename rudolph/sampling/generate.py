"""From a prompt to tokens: one loop for every segment and task.

The prompt is computed once for all samples of it; then one position at a time with a static
key-value cache, through the segment's part of the head alone.

Shapes: B prompts, S samples of each, N new tokens, T tokens, Vs the segment's vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rudolph.models.decoder import KeyValueCache, MaskedDecoder
from rudolph.sampling.filters import TokenSamplingConfig, draw, next_shares
from rudolph.sequence.layout import EOS, PAD

# An image token that is to be drawn.
FREE = -1


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
    known: Tensor | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Image indices ``(B * S, I)`` for left texts ``(B, l)``; S is ``len(seeds) / B``.

    Args:
        seeds: one for each sample, the samples of a prompt next to each other.
        unconditional: ``(l,)``, the left text that guidance leads away from.
        known: ``(B, I)``, indices that are given and not drawn; ``FREE`` where they are drawn.
        on_token: called with the number of tokens done.

    Raises:
        ValueError: when guidance is set and there is no unconditional text.
    """
    num_new, copies = model.layout.num_image_tokens, 1
    prompts = left
    if config.guidance is not None:
        if unconditional is None:
            raise ValueError("guidance needs an unconditional left text")
        prompts, copies = torch.cat([left, unconditional.expand_as(left)]), 2

    def head(hidden: Tensor) -> Tensor:
        logits = model.image_logits(hidden)[:, : model.vocabulary.codebook_size]
        return next_shares(logits[: len(seeds)], config, logits[len(seeds) :])

    return _generate(
        model,
        prompts,
        num_samples=len(seeds) // len(left),
        head=head,
        uniform=uniform_numbers(seeds, num_new),
        known=known,
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
        return next_shares(logits, config)

    drawn = _generate(
        model,
        tokens,
        num_samples=len(seeds) // len(tokens),
        head=head,
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
    uniform: Tensor,
    known: Tensor | None = None,
    copies: int = 1,
    stop: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """The loop: ``uniform`` (B * S, N) decides the draws; ``copies`` rows of a sample see them."""
    like, num_new = model.to_logits.weight, uniform.shape[1]
    tokens = torch.full_like(uniform, FREE, dtype=torch.long)
    num_given = 0
    if known is not None:
        tokens = known.cpu().repeat_interleave(num_samples, dim=0)
        # What is given at the beginning is read with the prompt.
        num_given = int((known != FREE).all(0).long().cumprod(0).sum())
        prompts = torch.cat([prompts, known[:, :num_given].repeat(copies, 1)], dim=1)
    tokens, uniform = tokens.to(like.device), uniform.to(like.device)
    if num_given == num_new:
        return tokens
    cache = KeyValueCache(model.config, model.layout, batch_size=len(prompts), like=like)
    hidden = model.hidden(prompts, cache)[:, -1].repeat_interleave(num_samples, dim=0)
    cache = cache.repeat(num_samples)
    has_stopped = torch.zeros(len(uniform), dtype=torch.bool, device=like.device)
    for step in range(num_given, num_new):
        drawn = draw(head(hidden), uniform[:, step])
        tokens[:, step] = torch.where(tokens[:, step] == FREE, drawn, tokens[:, step])
        if on_token is not None:
            on_token(step + 1)
        has_stopped |= tokens[:, step] == (FREE if stop is None else stop)
        if step + 1 == num_new or has_stopped.all():
            break
        new = tokens[:, step : step + 1].repeat(copies, 1)
        hidden = model.hidden(new, cache)[:, -1]
    return tokens.clamp(min=PAD)
