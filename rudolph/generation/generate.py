"""From a prompt to tokens: one loop for every segment and task.

The prompt is computed once for all samples of it; then come new positions with a static key-value
cache, through the segment's part of the head alone.

A token is a function of its distribution and of noise that is fixed before it (``noise``), so
what is drawn is a fixed point that several tokens at once can find.  The next ``window`` tokens
are guessed; one call gives the distributions after all of the guesses; each token is drawn again,
from its own, with its own noise.  Up to the first that differs from its guess, and with it, the
draws followed tokens that are final, so they are final too; the others are the next guesses.  A
window of 1 is decoding token by token.

Source: Teng et al. 2024 (arXiv:2410.01699) for the window and its first guesses; noise that is
kept instead of their test of ratios is Gumbel coupling (So et al. 2025, arXiv:2510.24211).

Shapes: B prompts, S samples of each, N new tokens, W tokens of a window, T tokens, C copies of
each sample (2 with guidance), D hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rudolph.generation.filters import TokenSamplingConfig, next_probabilities
from rudolph.generation.noise import NOISES
from rudolph.models.layers.kv_cache import KeyValueCache
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import EOS, PAD

# A token that is to be drawn.
FREE = -1


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
    """Image indices ``(B * S, I)`` for left texts ``(B, l)``; S is ``len(seeds) / B``.

    Args:
        seeds: one for each sample, the samples of a prompt next to each other.
        unconditional: ``(l,)``, the left text that guidance leads away from.
        known: ``(B, I)``, indices that are given and not drawn; ``FREE`` where they are drawn.
        window: tokens a call; the indices are the same for every window, up to rounding.
        coupling: a name in ``NOISES``.
        on_token: called after each call with the number of tokens done.

    Raises:
        ValueError: when guidance is set and there is no unconditional text, for a window below 1
            or an unknown coupling.
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
        known = torch.full((len(left), num_new), FREE)

    def redraw(hidden: Tensor, rows: Tensor, start: int) -> Tensor:
        width = hidden.shape[1]
        logits = model.image_logits(hidden)[..., :num_codes].flatten(0, 1)
        shares = next_probabilities(
            logits[: len(rows) * width], config, logits[len(rows) * width :]
        )
        own = noise[:, start : start + width].flatten(0, 1)
        return NOISES[coupling].draw(shares, own).view(-1, width)

    return _generate(
        model,
        prompts,
        known.to(left.device),
        num_samples=len(seeds) // len(left),
        redraw=redraw,
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
    """Text ids ``(B * S, N)`` after ``tokens`` (B, T), which end inside a text.

    N tokens are missing to the end of that text, the left one or the right one.  What follows the
    first ``EOS`` is padding; task tokens and padding ids are never drawn.

    Args:
        known: ``(B, N)``, ids that are given, as of prompts longer than others; else ``FREE``.
        allowed: ``(V,)`` bool over BPE ids, those that may be drawn; ``EOS`` always may.
    """
    num_new = text_end(model, tokens.shape[1]) - tokens.shape[1]
    noise = NOISES["inversion"].noise(seeds, num_new, 0).to(tokens.device)
    if known is None:
        known = torch.full((len(tokens), num_new), FREE)
    is_legal = legal_ids(model, allowed)

    def redraw(hidden: Tensor, rows: Tensor, start: int) -> Tensor:
        logits = model.text_logits(hidden[:, 0])[:, : len(is_legal)]
        logits = logits.masked_fill(~is_legal, -torch.inf)
        own = noise[rows, start]
        return NOISES["inversion"].draw(next_probabilities(logits, config), own)[:, None]

    drawn = _generate(
        model,
        tokens,
        known.to(tokens.device),
        num_samples=len(seeds) // len(tokens),
        redraw=redraw,
        stop=EOS,
        on_token=on_token,
    )
    is_after_end = (drawn == EOS).cumsum(1) - (drawn == EOS).long() > 0
    return drawn.masked_fill(is_after_end, PAD)


def text_end(model: MaskedDecoder, length: int) -> int:
    """Where the text ends inside which a sequence of ``length`` tokens ends."""
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
    """Which BPE ids may be drawn, ``(V,)`` bool: those allowed and ``EOS``, never padding."""
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
    redraw: Callable[[Tensor, Tensor, int], Tensor],
    window: int = 1,
    stop: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """The loop: ``prompts`` (C * B, T) and ``known`` (B, N) to tokens (B * S, N).

    Args:
        redraw: tokens ``(., W)`` of ``hidden`` (C * ., W, D), which samples these are, (.,), and
            the first one's place.
        stop: a sample that has drawn it is done, and leaves the batch when half of it has.
    """
    places = (known == FREE).any(0).nonzero().flatten().tolist()
    tokens = known.repeat_interleave(num_samples, dim=0)
    if not places:
        return tokens
    given, last, copies = places[0], places[-1], len(prompts) // len(known)
    # What all have at the beginning is read with the prompt, once for all of its samples.
    prompts = torch.cat([prompts, known[:, :given].repeat(copies, 1)], dim=1)
    num_prefix = model.num_leading + prompts.shape[1]
    cache = model.new_cache(len(prompts), num_positions=num_prefix)
    hidden = model.hidden(prompts, cache)[:, -1:].repeat_interleave(num_samples, dim=0)
    cache = cache.repeat(num_samples, num_positions=last - given)
    is_free, tokens = tokens == FREE, tokens.clamp(min=PAD)
    rows = torch.arange(len(tokens), device=tokens.device).view(len(known), num_samples)
    is_going, done, end = torch.ones_like(rows, dtype=torch.bool), given, given + 1
    while True:
        at = rows.flatten()
        guesses = tokens[at, done:end]
        drawn = torch.where(is_free[at, done:end], redraw(hidden, at, done), guesses)
        tokens[at, done:end] = drawn
        final = done + 1
        if end > final:
            is_right = (drawn == guesses)[:, :-1].all(0)
            final += int(is_right.long().cumprod(0).sum())
        # What every sample is given needs no draw.
        done = next((place for place in places if place >= final), tokens.shape[1])
        if on_token is not None:
            on_token(done)
        if stop is not None:
            is_going &= (drawn != stop).view_as(rows)
        if done > last or not is_going.any():
            return tokens
        if not model.has_compiled_layers:
            # Where steps are compiled, another number of samples would be another compilation.
            rows, is_going, cache = _without_ended(rows, is_going, cache)
        guessed, end = end, min(done + window, last + 1)
        _guess(tokens, is_free, range(guessed, end - 1), model.layout.image_tokens_per_dim)
        # What was read after a wrong guess is forgotten, and the guess itself is read anew.
        cache.length = num_prefix + final - 1 - given
        new = tokens[rows.flatten(), final - 1 : end - 1].repeat(copies, 1)
        hidden = model.hidden(new, cache)[:, done - end :]


def _without_ended(
    rows: Tensor, is_going: Tensor, cache: KeyValueCache
) -> tuple[Tensor, Tensor, KeyValueCache]:
    """Samples ``rows`` (B, S) with half of them or fewer left out that are done, if so many are.

    As many are kept of each prompt as go on of the one with the most.
    """
    prompts = is_going.any(1).nonzero().flatten()
    num_samples = int(is_going.sum(1).max())
    if 2 * len(prompts) * num_samples > rows.numel():
        return rows, is_going, cache
    order = is_going[prompts].int().argsort(dim=1, descending=True, stable=True)
    samples = order[:, :num_samples]
    kept = [part[prompts].gather(1, samples) for part in (rows, is_going)]
    return kept[0], kept[1], cache.keep(prompts, samples)


def _guess(tokens: Tensor, is_free: Tensor, places: range, side: int) -> None:
    """Put the token right above, in the first row the first token, where none is given."""
    for place in places:
        above = tokens[:, max(place - side, 0)]
        tokens[:, place] = torch.where(is_free[:, place], above, tokens[:, place])
