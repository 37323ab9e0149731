"""Answers after documents of images and texts: learnt, sampled, or scored among given choices.

A model reads the documents of a batch once.  Sampling then appends tokens to its state, and
scoring repeats the state for every choice, so shots and images are never read again.

Shapes: B documents, C choices per document, S new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rudolph.data.documents import DocumentBatch
from rudolph.generation.filters import TokenSamplingConfig, next_probabilities, sample_token
from rudolph.generation.noise import uniform_numbers
from rudolph.models.lm.decode import decode_tokens
from rudolph.sequence.conversation import IGNORE
from rudolph.sequence.layout import EOS, PAD


class DocumentState(Protocol):
    """The state of a model that has read documents: its caches and the logits that follow."""

    @property
    def logits(self) -> Tensor:
        """Return the logits ``(B, V)`` after the documents."""
        ...

    def append(self, tokens: Tensor) -> Tensor:
        """Read tokens ``(B, S)`` and return the logits after each, ``(B, S, V)``."""
        ...

    def repeat(self, number: int) -> "DocumentState":
        """Return the state with every document repeated ``number`` times in succession."""
        ...


class DocumentReader(Protocol):
    """A model that reads documents."""

    def logits(self, documents: DocumentBatch) -> Tensor:
        """Return the logits of all positions, ``(B, T, V)``."""
        ...

    def read(self, documents: DocumentBatch, *, num_new: int) -> DocumentState:
        """Read documents and return a state with room for ``num_new`` more tokens."""
        ...


def count_choices(choices: Sequence[Sequence[str]]) -> int:
    """Return the number of choices of each text, or 1 if there are no texts.

    Raises:
        ValueError: If the numbers differ.
    """
    counts = {len(row) for row in choices}
    if len(counts) > 1:
        raise ValueError(f"choices: expected equally many for each text, got {sorted(counts)}")
    return max(counts, default=1)


def answer_labels(documents: DocumentBatch) -> Tensor:
    """Return the label ``(B, T - 1)`` of each position's next token; ``IGNORE`` means no label."""
    return documents.labels[:, 1:]


def answer_losses(reader: DocumentReader, documents: DocumentBatch) -> tuple[Tensor, Tensor]:
    """Return the loss of each label in nats, and the index of its document, both ``(L,)``."""
    logits, labels = reader.logits(documents)[:, :-1], answer_labels(documents)
    is_label = labels != IGNORE
    losses = F.cross_entropy(logits[is_label].float(), labels[is_label], reduction="none")
    return losses, is_label.nonzero()[:, 0]


@torch.inference_mode()
def sample_document_answers(
    reader: DocumentReader,
    documents: DocumentBatch,
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    num_tokens: int,
    allowed: Tensor,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample answers ``(B, S)``, each from its own seed and up to its first ``EOS``.

    Args:
        reader: The model.
        documents: Prompts, padded on the left.
        config: How tokens are sampled.
        seeds: One per document.
        num_tokens: Maximum number of new tokens.
        allowed: ``(V,)`` bool, true for ids that an answer may contain.
        on_token: Called with the number of tokens sampled so far.
    """
    state = reader.read(documents, num_new=num_tokens)
    uniform = uniform_numbers(seeds, num_tokens).to(state.logits.device)
    allowed = allowed.to(state.logits.device)

    def choose(logits: Tensor, number: int) -> Tensor:
        if on_token is not None:
            on_token(number + 1)
        probabilities = next_probabilities(logits.masked_fill(~allowed, -torch.inf), config)
        return sample_token(probabilities, uniform[:, number])

    return decode_tokens(
        state.logits,
        lambda token: state.append(token)[:, -1],
        num_tokens=num_tokens,
        end_id=EOS,
        choose=choose,
    )


@torch.inference_mode()
def score_document_choices(
    reader: DocumentReader, documents: DocumentBatch, choices: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """Return the log-likelihood ``(B, C)`` in nats of each choice as a document's answer.

    Args:
        reader: The model.
        documents: Prompts, padded on the left.
        choices: For each document, C choices as token ids that end with ``EOS``.
    """
    number = len(choices[0])
    rows = [torch.tensor(choice) for row in choices for choice in row]
    device = documents.input_ids.device
    tokens = pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)  # (B * C, S)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    is_token = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    state = reader.read(documents, num_new=tokens.shape[1]).repeat(number)
    logits = state.logits[:, None]
    if tokens.shape[1] > 1:
        logits = torch.cat([logits, state.append(tokens[:, :-1])], dim=1)
    nats = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    return -(nats.view_as(tokens) * is_token).sum(1).view(-1, number)
