"""Beam search for the most likely texts after a prompt, with the same cache as sampling.

Shapes: B prompts, K beams, N new tokens, V text ids, T tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.generation.generate import legal_ids, text_end
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import EOS, PAD


class Beams(NamedTuple):
    """Texts ``(B, K, N)``, best first, and their log-likelihoods ``(B, K)`` in nats.

    If fewer than K texts exist, the surplus beams have a log-likelihood of minus infinity.
    """

    ids: Tensor
    log_likelihoods: Tensor


@torch.inference_mode()
def search_text(
    model: MaskedDecoder,
    tokens: Tensor,
    *,
    num_beams: int,
    length_penalty: float = 0.0,
    allowed: Tensor | None = None,
) -> Beams:
    """Search for the ``num_beams`` most likely texts after each prompt.

    Each step keeps the most likely prefixes; a finished prefix stays unchanged.  With as many
    beams as there are texts the search is exhaustive and therefore exact.

    Args:
        model: the decoder.
        tokens: ``(B, T)``, prompts that end inside a text segment.
        num_beams: the beam width K, which is also the number of texts returned.
        length_penalty: texts are ordered by ``log_likelihood / num_tokens ** length_penalty``
            (Wu 2016, arXiv:1609.08144, without its constant).  0 orders by likelihood.
        allowed: ``(V,)`` bool, true for the BPE ids that a text may contain; ``EOS`` is always
            allowed.

    Raises:
        ValueError: if ``num_beams`` is below 1, the penalty is not finite, or the prompts do not
            end inside a text segment.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    num_new = text_end(model, tokens.shape[1]) - tokens.shape[1]
    is_legal = legal_ids(model, allowed)
    num_prompts, device = len(tokens), tokens.device
    cache = model.new_cache(num_prompts, num_positions=model.num_leading + tokens.shape[1])
    hidden = model.hidden(tokens, cache)[:, -1].repeat_interleave(num_beams, dim=0)
    cache = cache.expand_samples(num_beams, num_positions=num_new - 1)
    ids = torch.full((num_prompts, num_beams, num_new), PAD, device=device)
    # All beams start from the same prefix, so only the first one may count.
    log_likelihoods = torch.full((num_prompts, num_beams), -torch.inf, device=device)
    log_likelihoods[:, 0] = 0
    is_ended = torch.zeros_like(log_likelihoods, dtype=torch.bool)
    all_prompts = torch.arange(num_prompts, device=device)
    for step in range(num_new):
        logits = model.text_logits(hidden)[:, : len(is_legal)].float()
        log_probs = logits.masked_fill(~is_legal, -torch.inf).log_softmax(-1)
        log_probs = log_probs.view(num_prompts, num_beams, -1)
        # A finished text continues with padding alone, at no cost.
        padding_only = torch.full_like(log_probs[0, 0], -torch.inf)
        padding_only[PAD] = 0
        log_probs = torch.where(is_ended[..., None], padding_only, log_probs)
        best = (log_likelihoods[..., None] + log_probs).flatten(1).topk(num_beams)
        parents, next_ids = best.indices // log_probs.shape[-1], best.indices % log_probs.shape[-1]
        log_likelihoods = best.values
        ids = ids.gather(1, parents[..., None].expand_as(ids))
        ids[:, :, step] = next_ids
        is_ended = is_ended.gather(1, parents) | (next_ids == EOS) | log_likelihoods.isneginf()
        if step + 1 == num_new or bool(is_ended.all()):
            break
        cache = cache.select(all_prompts, parents)
        hidden = model.hidden(next_ids.view(-1, 1), cache)[:, -1]
    lengths = (ids != PAD).sum(-1).clamp(min=1)
    order = (log_likelihoods / lengths**length_penalty).argsort(
        dim=1, descending=True, stable=True
    )
    return Beams(ids.gather(1, order[..., None].expand_as(ids)), log_likelihoods.gather(1, order))
