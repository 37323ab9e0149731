"""The decoding loop: from a prompt to tokens, for every segment and task.

The prompt is computed once for all of its samples.  New positions then use a static key/value
cache, and only the segment's part of the output head.

A token is a function of its distribution and of noise that is fixed in advance (``noise``).  The
sampled sequence is therefore a fixed point, which can be found several tokens at a time:

1.  Guess the next ``window`` tokens.
2.  Compute the distributions after all guesses in one call.
3.  Sample each token again from its own distribution, with its own noise.
4.  Accept the tokens up to and including the first one that differs from its guess.  Accepted
   tokens follow only final tokens, so they are final too.  The other tokens are the next guesses.

A window of 1 decodes token by token.

Source: Teng et al. 2024 (arXiv:2410.01699) for the window and its first guesses.  Fixed noise
replaces their ratio test; this is Gumbel coupling (So et al. 2025, arXiv:2510.24211).

Shapes: B prompts, S samples per prompt, N new tokens, W tokens per window, T tokens, I image
tokens, C copies of each sample (2 with guidance), D hidden size, V text ids.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rudolph.generation.filters import TokenSamplingConfig, next_probabilities
from rudolph.generation.noise import NOISES
from rudolph.models.layers.kv_cache import KeyValueCache
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import EOS, PAD

# Marks a position whose token is sampled.
TO_SAMPLE = -1


@torch.inference_mode()
def generate_image(
    model: MaskedDecoder,
    left: Tensor,
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    unconditional: Tensor | None = None,
    known: Tensor | None = None,
    window: int = 1,
    coupling: str = "inversion",
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample image indices ``(B * S, I)`` after left texts.

    Args:
        model: the decoder.
        left: ``(B, l)``, the left texts.
        config: how image tokens are sampled.
        seeds: one per sample, B * S, with the samples of a prompt next to each other.
        unconditional: ``(l,)``, the left text that guidance extrapolates away from.
        known: ``(B, I)``, indices that are given, and ``TO_SAMPLE`` at positions that are sampled.
        window: tokens per call; the indices are the same for every window, up to rounding.
        coupling: a name in ``NOISES``.
        on_token: called after each call with the number of tokens done.

    Raises:
        ValueError: if guidance is set without an unconditional text, the window is below 1, or the
            coupling is unknown.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if coupling not in NOISES:
        raise ValueError(f"coupling must be one of {', '.join(NOISES)}, got {coupling!r}")
    num_new, num_codes = model.layout.num_image_tokens, model.vocabulary.codebook_size
    prompts = left
    if config.guidance is not None:
        if unconditional is None:
            raise ValueError("guidance needs an unconditional left text")
        prompts = torch.cat([left, unconditional.expand_as(left)])
    noise = NOISES[coupling].noise(seeds, num_new, num_codes).to(left.device)
    if known is None:
        known = torch.full((len(left), num_new), TO_SAMPLE)

    def resample(hidden: Tensor, rows: Tensor, start: int) -> Tensor:
        width = hidden.shape[1]
        logits = model.image_logits(hidden)[..., :num_codes].flatten(0, 1)
        probabilities = next_probabilities(
            logits[: len(rows) * width], config, logits[len(rows) * width :]
        )
        window_noise = noise[:, start : start + width].flatten(0, 1)
        return NOISES[coupling].sample(probabilities, window_noise).view(-1, width)

    return _generate(
        model,
        prompts,
        known.to(left.device),
        num_samples=len(seeds) // len(left),
        resample=resample,
        window=window,
        on_token=on_token,
    )


@torch.inference_mode()
def generate_text(
    model: MaskedDecoder,
    tokens: Tensor,
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    known: Tensor | None = None,
    allowed: Tensor | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample text ids ``(B * S, N)`` after prompts that end inside a text segment.

    N is the number of tokens to the end of that segment, the left or the right text.  Positions
    after the first ``EOS`` are padding.  Task tokens and padding ids are never sampled.

    Args:
        model: the decoder.
        tokens: ``(B, T)``, the prompts.
        config: how tokens are sampled; ``guidance`` has no effect.
        seeds: one per sample, B * S, with the samples of a prompt next to each other.
        known: ``(B, N)``, ids that are given, such as the rest of longer prompts, and
            ``TO_SAMPLE`` elsewhere.
        allowed: ``(V,)`` bool, true for BPE ids that may be sampled; ``EOS`` is always allowed.
        on_token: called after each call with the number of tokens done.

    Raises:
        ValueError: if the prompts do not end inside a text segment.
    """
    num_new = text_end(model, tokens.shape[1]) - tokens.shape[1]
    noise = NOISES["inversion"].noise(seeds, num_new, 0).to(tokens.device)
    if known is None:
        known = torch.full((len(tokens), num_new), TO_SAMPLE)
    is_legal = legal_ids(model, allowed)

    def resample(hidden: Tensor, rows: Tensor, start: int) -> Tensor:
        logits = model.text_logits(hidden[:, 0])[:, : len(is_legal)]
        logits = logits.masked_fill(~is_legal, -torch.inf)
        token_noise = noise[rows, start]
        return NOISES["inversion"].sample(next_probabilities(logits, config), token_noise)[:, None]

    generated = _generate(
        model,
        tokens,
        known.to(tokens.device),
        num_samples=len(seeds) // len(tokens),
        resample=resample,
        stop=EOS,
        on_token=on_token,
    )
    is_after_end = (generated == EOS).cumsum(1) - (generated == EOS).long() > 0
    return generated.masked_fill(is_after_end, PAD)


def text_end(model: MaskedDecoder, length: int) -> int:
    """Return the end of the text segment inside which a sequence of ``length`` tokens ends.

    Raises:
        ValueError: if such a sequence does not end inside a text segment.
    """
    layout = model.layout
    if length < layout.left_text_length:
        return layout.left_text_length
    if not layout.right_text_start <= length < layout.length:
        raise ValueError(
            f"tokens must end inside a text (before {layout.left_text_length}, or from "
            f"{layout.right_text_start} to {layout.length - 1}), got {length}"
        )
    return layout.length


def legal_ids(model: MaskedDecoder, allowed: Tensor | None) -> Tensor:
    """Return a mask ``(V,)`` of BPE ids that may be sampled.

    These are the allowed ids and ``EOS``, but never padding.

    Args:
        model: the decoder, whose vocabulary gives V.
        allowed: bool over the first BPE ids, true for those that may be sampled; None allows all.
    """
    device = model.final_norm.weight.device
    is_legal = torch.ones(model.vocabulary.bpe_size, dtype=torch.bool, device=device)
    if allowed is not None:
        is_legal[: len(allowed)] &= allowed.to(device)
        is_legal[len(allowed) :] = False
    is_legal[EOS], is_legal[PAD] = True, False
    return is_legal


def _generate(
    model: MaskedDecoder,
    prompts: Tensor,
    known: Tensor,
    *,
    num_samples: int,
    resample: Callable[[Tensor, Tensor, int], Tensor],
    window: int = 1,
    stop: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Run the decoding loop; return tokens ``(B * S, N)``.

    Args:
        model: the decoder.
        prompts: ``(C * B, T)``.
        known: ``(B, N)``, tokens that are given, and ``TO_SAMPLE`` at positions that are sampled.
        num_samples: S.
        resample: samples tokens ``(R, W)`` for R samples.  Its arguments are ``hidden`` (C * R, W,
            D), the numbers of the samples (R,) and the position of the first token.
        window: W.
        stop: a sample that contains this token is finished.  Finished samples leave the batch once
            half of the batch is finished.
        on_token: called after each call with the number of tokens done.
    """
    positions = (known == TO_SAMPLE).any(0).nonzero().flatten().tolist()
    tokens = known.repeat_interleave(num_samples, dim=0)
    if not positions:
        return tokens
    num_given, last, num_copies = positions[0], positions[-1], len(prompts) // len(known)
    # Leading tokens that are given for all prompts are computed once, together with the prompt.
    prompts = torch.cat([prompts, known[:, :num_given].repeat(num_copies, 1)], dim=1)
    num_prefix, side = model.num_leading + prompts.shape[1], model.layout.image_tokens_per_dim
    cache = model.new_cache(len(prompts), num_positions=num_prefix)
    hidden = model.hidden(prompts, cache)[:, -1:].repeat_interleave(num_samples, dim=0)
    cache = cache.expand_samples(num_samples, num_positions=last - num_given)
    is_to_sample, tokens = tokens == TO_SAMPLE, tokens.clamp(min=PAD)
    rows = torch.arange(len(tokens), device=tokens.device).view(len(known), num_samples)
    is_unfinished, num_done, end = torch.ones_like(rows).bool(), num_given, num_given + 1
    while True:
        numbers = rows.flatten()
        guesses, is_sampled = tokens[numbers, num_done:end], is_to_sample[numbers, num_done:end]
        sampled = torch.where(is_sampled, resample(hidden, numbers, num_done), guesses)
        tokens[numbers, num_done:end] = sampled
        num_final = num_done + 1
        if end > num_final:
            is_accepted = (sampled == guesses)[:, :-1].all(0)
            num_final += int(is_accepted.long().cumprod(0).sum())
        # Positions that are given for every sample need no sampling.
        num_done = next((index for index in positions if index >= num_final), tokens.shape[1])
        if on_token is not None:
            on_token(num_done)
        if stop is not None:
            is_unfinished &= (sampled != stop).view_as(rows)
        if num_done > last or not is_unfinished.any():
            return tokens
        if not model.has_compiled_layers:
            # Compiled layers would have to be compiled again for another number of samples.
            rows, is_unfinished, cache = _drop_finished(rows, is_unfinished, cache)
        guess_start, end = end, min(num_done + window, last + 1)
        _guess(tokens, is_to_sample, range(guess_start, end - 1), side)
        # Drop the cache entries from the first wrong guess on, and compute its position again.
        cache.length = num_prefix + num_final - 1 - num_given
        new_tokens = tokens[rows.flatten(), num_final - 1 : end - 1].repeat(num_copies, 1)
        hidden = model.hidden(new_tokens, cache)[:, num_done - end :]


def _drop_finished(
    rows: Tensor, is_unfinished: Tensor, cache: KeyValueCache
) -> tuple[Tensor, Tensor, KeyValueCache]:
    """Drop finished samples from ``rows`` (B, S) if this at least halves the batch.

    All remaining prompts keep the same number of samples: the largest number of unfinished
    samples of any prompt.
    """
    prompts = is_unfinished.any(1).nonzero().flatten()
    num_samples = int(is_unfinished.sum(1).max())
    if 2 * len(prompts) * num_samples > rows.numel():
        return rows, is_unfinished, cache
    order = is_unfinished[prompts].int().argsort(dim=1, descending=True, stable=True)
    samples = order[:, :num_samples]
    kept = [values[prompts].gather(1, samples) for values in (rows, is_unfinished)]
    return kept[0], kept[1], cache.select(prompts, samples)


def _guess(tokens: Tensor, is_to_sample: Tensor, positions: range, side: int) -> None:
    """Guess tokens that are not given: the token above, or in the first row the first token."""
    for position in positions:
        above = tokens[:, max(position - side, 0)]
        tokens[:, position] = torch.where(is_to_sample[:, position], above, tokens[:, position])
