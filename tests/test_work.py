"""The work per token, counted and not timed: logits, keys, operations and memory."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import generate_image
from rudolph.models.layers import attention as attention_module
from rudolph.models.rudolph import decoder as layer_module
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.sequence.layout import SequenceLayout, Vocabulary

LAYOUT, VOCABULARY = SequenceLayout(7, 6, 4), Vocabulary(50, 3, 7, 29, 2)
CONFIG = DecoderConfig(num_layers=4, hidden_size=24, num_heads=3)
SAMPLING = TokenSamplingConfig(top_k=9, top_p=0.9)
NUM_SAMPLES = 5


class Work(TorchDispatchMode):
    """A counter of operations that also records their largest memory allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for found in out if isinstance(out, tuple | list) else [out]:
            is_new = isinstance(found, torch.Tensor) and not function.is_view
            if is_new and found.data_ptr() not in given:
                self.largest = max(self.largest, found.nbytes)
        return out


def decoder() -> MaskedDecoder:
    torch.manual_seed(0)
    return MaskedDecoder(CONFIG, LAYOUT, VOCABULARY).eval()


def drawn_with(work: Work, model: MaskedDecoder) -> list[tuple[int, int]]:
    """Return the operations and the largest allocation of each token of an image but the first."""
    tokens: list[tuple[int, int]] = []

    def on_token(_: int) -> None:
        tokens.append((sum(work.calls.values()), work.largest))
        work.calls.clear()
        work.largest = 0

    left = torch.full((1, 7), 5)
    with work:
        generate_image(model, left, config=SAMPLING, seeds=range(NUM_SAMPLES), on_token=on_token)
    return tokens[1:]


def test_a_token_costs_the_same_number_of_operations_wherever_it_stands() -> None:
    model = decoder()
    # The first image computes what its masks read; later images reuse it.
    drawn_with(Work(), model)
    operations = [count for count, _ in drawn_with(Work(), model)]
    assert len(operations) == 35
    assert max(operations) - min(operations) <= 12
    # Four layers and the sampling; an extra operation per layer would exceed this.
    assert max(operations) <= 4 * 60 + 100


def test_no_token_asks_for_memory_of_the_size_of_the_cache_or_the_head() -> None:
    largest = max(size for _, size in drawn_with(Work(), decoder()))
    logits = NUM_SAMPLES * VOCABULARY.image_size * 4
    hidden = NUM_SAMPLES * 4 * CONFIG.hidden_size * 4
    scores = NUM_SAMPLES * CONFIG.num_heads * LAYOUT.length * 4
    # The keys of one layer would be eight times as large as the scores.
    assert largest <= max(2 * logits, hidden, scores)


def test_only_image_logits_of_the_last_position_are_computed() -> None:
    model = decoder()
    seen: list[tuple[int, tuple[int, ...]]] = []
    for number, head in enumerate(heads := model.to_logits.heads()):
        heads[number] = lambda hidden, number=number, head=head: (
            seen.append((number, tuple(hidden.shape))) or head(hidden)
        )
    model.to_logits.heads = lambda: heads
    generate_image(model, torch.full((2, 7), 5), config=SAMPLING, seeds=range(6))
    assert seen == [(1, (6, 1, 24))] * 36


@pytest.mark.parametrize(("mask", "most"), [("row", 7), ("column", 6), ("conv(3)", 3 * 5)])
def test_keys_read_are_tens_and_those_of_the_prompt_are_read_once(
    monkeypatch: pytest.MonkeyPatch, mask: str, most: int
) -> None:
    reads: list[tuple[int, int, int]] = []

    def counted(query, seen, **rest):
        if query.shape[1] == 1:
            shared, own = seen
            reads.append((len(shared.key), shared.key.shape[1], own.key.shape[1]))
        return attention_module.attention(query, seen, **rest)

    monkeypatch.setattr(layer_module, "attention", counted)
    torch.manual_seed(0)
    config = DecoderConfig(2, 24, 3, layer_masks=(mask,), last_layer_mask=None)
    model = MaskedDecoder(config, LAYOUT, VOCABULARY).eval()
    generate_image(model, torch.full((1, 7), 5), config=SAMPLING, seeds=range(NUM_SAMPLES))
    assert len(reads) == 2 * 35
    # Three heads of one prompt for all samples, its seven keys, and few keys of each sample.
    assert {(rows, shared) for rows, shared, _ in reads} == {(3, 7)}
    assert max(own for _, _, own in reads) <= most
