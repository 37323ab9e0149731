"""Evaluators of a decoder's numerics: convergence of training and size of attention logits.

Shapes: N examples, T tokens, H head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext, Score, mean_score
from rudolph.generation.ranking import perplexities
from rudolph.models.rudolph.decoder import HALF_MAX, Layer

CONVERGED = "decoder/converged"


def convergence(context: EvaluationContext, split: Split) -> list[Score]:
    """Score 1 if the decoder's perplexity on images is below that of a uniform guess, else 0.

    A run whose loss was not finite scores 0, see ``diverged_score``.
    """
    pipeline, tokens = context.pipeline, _sequences(context, split, context.eval_indices(split))
    image_perplexities = perplexities(
        pipeline.decoder, tokens, segments=("image",), batch_size=pipeline.batch_size
    )["image"]
    is_better = (
        float(image_perplexities.log().mean().exp()) < pipeline.decoder.vocabulary.codebook_size
    )
    return [_converged_score(split.name, is_converged=is_better)]


def diverged_score(split: str) -> Score:
    """Return the ``convergence`` score of a run whose loss was not finite: 0."""
    return _converged_score(split, is_converged=False)


def _converged_score(split: str, *, is_converged: bool) -> Score:
    value = float(is_converged)
    return Score(CONVERGED, split, value, value, value, None, 1)


def attention_logits(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate the largest attention logit per example, in float32 and before any relaxation.

    A second score is the fraction of examples with a logit that float16 cannot represent.
    """
    max_logits: list[Tensor] = []
    indices, decoder = context.eval_indices(split), context.pipeline.decoder
    tokens = _sequences(context, split, indices)
    with record_attention_logits(decoder, max_logits), torch.inference_mode():
        decoder.hidden(tokens.to(context.pipeline.device))
    values = torch.stack(max_logits).amax(0).double().cpu().numpy()
    is_overflow = (values > HALF_MAX).astype(np.float64)
    return [
        mean_score("decoder/max_attention_logit", split, indices, values, context),
        mean_score("decoder/attention_overflows", split, indices, is_overflow, context),
    ]


@contextmanager
def record_attention_logits(decoder: nn.Module, max_logits: list[Tensor]) -> Iterator[None]:
    """Append each example's largest absolute logit, ``(N,)``, for every layer that is run."""

    def record(layer: nn.Module, args: Any) -> None:
        assert isinstance(layer, Layer)
        qkv = layer.project_qkv(layer.attention_norm(args[0])).float()
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, T, H) each
        scores = query @ key.mT / query.shape[-1] ** 0.5
        is_masked = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        max_logits.append(scores.abs().masked_fill(is_masked, 0).amax((1, 2, 3)))

    layers = [module for module in decoder.modules() if isinstance(module, Layer)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sequences(context: EvaluationContext, split: Split, indices: Sequence[int]) -> Tensor:
    """Return the tokens ``(N, T)`` of captions, each followed by its real image."""
    texts = [context.pipeline.texts("text_to_image", split.captions[index]) for index in indices]
    left, right = (torch.stack(list(side)) for side in list(zip(*texts, strict=True))[:2])
    return torch.cat([left, context.image_indices(split, indices), right], dim=1)
