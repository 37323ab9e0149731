"""Sampling: the reference's filters, correct frequencies, and the same sample in any batch."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from rudolph.generation.filters import (
    FILTER_ORDER,
    TokenSamplingConfig,
    apply_guidance,
    filter_logits,
    next_probabilities,
    sample_token,
)
from rudolph.generation.generate import TO_SAMPLE, generate_image, generate_text
from rudolph.generation.noise import uniform_numbers
from rudolph.models.reference import from_reference
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.sequence.layout import EOS, PAD, SequenceLayout, Vocabulary

PLAIN = TokenSamplingConfig()
GREEDY = TokenSamplingConfig(top_k=1)


def small_decoder() -> MaskedDecoder:
    torch.manual_seed(2)
    config = DecoderConfig(3, 24, 3, layer_masks=("row", "column"), last_layer_mask="conv(3)")
    return MaskedDecoder(config, SequenceLayout(5, 3, 6), Vocabulary(20, 3, 5, 11, 2)).eval()


LEFT = torch.tensor([[2, 7, 3, 0, 0], [2, 9, 11, 3, 0], [2, 3, 0, 0, 0]])


def test_filters_equal_the_reference(parity) -> None:
    io = parity("sampling_and_scores").io
    names = [name for name in io if name.startswith("filtered_")]
    assert len(names) >= 6
    for name in names:
        k, p = name.removeprefix("filtered_k").split("_p")
        config = TokenSamplingConfig(top_k=int(k) or None, top_p=float(p))
        assert torch.equal(filter_logits(io["logits"], config), io[name]), name


def test_filters_that_are_off_are_the_identity() -> None:
    logits = torch.randn(3, 9)
    assert torch.equal(filter_logits(logits, PLAIN), logits)
    assert torch.equal(filter_logits(logits, TokenSamplingConfig(top_k=9, top_p=1.0)), logits)


def test_a_smaller_filter_keeps_a_subset_and_ties_keep_no_more_than_k() -> None:
    logits = torch.randn(4, 30)
    for name, values in {"top_k": [1, 3, 8, 20], "top_p": [0.1, 0.4, 0.8, 0.99]}.items():
        kept = [
            torch.isfinite(filter_logits(logits, TokenSamplingConfig(**{name: value})))
            for value in values
        ]
        for fewer, more in itertools.pairwise(kept):
            assert (fewer <= more).all() and fewer.any(1).all()
    tied = filter_logits(torch.zeros(2, 10), TokenSamplingConfig(top_k=4))
    assert torch.isfinite(tied).sum(1).tolist() == [4, 4]


def naive_filter(logits: list[float], config: TokenSamplingConfig) -> dict[int, float]:
    """Apply the filters to one row in order, by definition; return the remaining probabilities."""
    kept = dict(enumerate(logits))
    for name in config.filter_order:
        shares = {at: math.exp(value) for at, value in kept.items()}
        total = sum(shares.values())
        order = sorted(kept, key=lambda at: (-kept[at], at))
        if name == "temperature":
            kept = {at: value / config.temperature for at, value in kept.items()}
        elif name == "top_k":
            kept = {at: kept[at] for at in order[: config.top_k]}
        elif name == "min_p":
            kept = {at: kept[at] for at in order if shares[at] >= config.min_p * shares[order[0]]}
        else:
            masses = itertools.accumulate((shares[at] / total for at in order), initial=0)
            kept = {
                at: kept[at]
                for at, mass in zip(order, masses, strict=False)
                if mass <= config.top_p
            }
    total = sum(math.exp(value) for value in kept.values())
    return {at: math.exp(value) / total for at, value in kept.items()}


def test_filters_in_any_order_leave_what_their_words_say() -> None:
    logits = torch.randn(5, 23, generator=torch.Generator().manual_seed(4)).double() * 2
    found = set()
    for order in itertools.permutations(FILTER_ORDER):
        config = TokenSamplingConfig(2.5, top_k=7, top_p=0.7, min_p=0.2, filter_order=order)
        shares = filter_logits(logits, config).softmax(-1)
        for row, values in zip(shares.tolist(), logits.tolist(), strict=True):
            expected = naive_filter(values, config)
            assert {at for at, share in enumerate(row) if share > 0} == set(expected)
            assert all(abs(row[at] - share) < 1e-9 for at, share in expected.items())
        found.add(tuple((shares > 0).sum(1).tolist()))
    assert len(found) > 3  # the order matters
    with pytest.raises(ValueError, match="order must have each of temperature, top_k"):
        TokenSamplingConfig(filter_order=("top_k", "top_p"))


def test_draws_have_the_frequencies_of_the_filtered_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    config = TokenSamplingConfig(temperature=0.8, top_k=4, top_p=0.95)
    expected = filter_logits(logits, config).softmax(-1)[0]
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = sample_token(next_probabilities(logits, config).expand(20_000, -1), uniform)
    counts = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(counts, expected, atol=1e-3, rtol=0)


def test_a_draw_at_either_end_takes_a_token_that_is_allowed() -> None:
    logits = torch.tensor([[-torch.inf, 3.0, 1.0, -torch.inf]])
    ends = torch.tensor([0.0, 1.0 - 2**-24, 1.0])
    assert sample_token(next_probabilities(logits, PLAIN).expand(3, -1), ends).tolist() == [
        1,
        2,
        2,
    ]


def test_guidance_of_one_is_the_condition_and_of_zero_is_none() -> None:
    conditional, rest = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(apply_guidance(conditional, rest, 1.0), conditional)
    torch.testing.assert_close(apply_guidance(conditional, rest, 0.0), rest)


@pytest.mark.parametrize("case", ["rudolph_350m_like", "rudolph_v1_no_specials"])
def test_greedy_images_equal_the_reference(parity, case: str) -> None:
    golden = parity(case)
    model = from_reference("rudolph", golden.config, golden.weights).eval()
    left = golden.io["tokens"][:, :6]
    found = generate_image(model, left, config=GREEDY, seeds=range(len(left)))
    assert torch.equal(found, golden.io["greedy_image"])


@pytest.mark.parametrize("guidance", [None, 2.5])
def test_a_sample_is_the_same_alone_and_in_a_batch(guidance: float | None) -> None:
    model, config = small_decoder(), replace(PLAIN, guidance=guidance)
    seeds = [11, 12, 21, 22, 31, 32]
    together = generate_image(model, LEFT, config=config, seeds=seeds, unconditional=LEFT[2])
    for at, seed in enumerate(seeds):
        prompt = LEFT[at // 2 : at // 2 + 1]
        alone = generate_image(model, prompt, config=config, seeds=[seed], unconditional=LEFT[2])
        assert torch.equal(together[at], alone[0])
    assert len({tuple(row) for row in together.tolist()}) > 3


def test_sampling_agrees_with_full_passes_without_a_cache() -> None:
    model = small_decoder()
    uniform = uniform_numbers([5, 6, 7], 9)
    tokens = LEFT
    for step in range(9):
        logits = model.image_logits(model.hidden(tokens)[:, -1])[:, :11]
        tokens = torch.cat(
            [tokens, sample_token(next_probabilities(logits, PLAIN), uniform[:, step])[:, None]],
            dim=1,
        )
    found = generate_image(model, LEFT, config=PLAIN, seeds=[5, 6, 7])
    assert torch.equal(found, tokens[:, 5:])


def test_right_text_stops_and_never_holds_what_is_no_text() -> None:
    model = small_decoder()
    prompt = torch.cat([LEFT, torch.zeros(3, 9, dtype=torch.long), LEFT[:, :2]], dim=1)
    counts: Counter[int] = Counter()
    for seed in range(40):
        seeds = [3 * seed, 3 * seed + 1, 3 * seed + 2]
        for row in generate_text(model, prompt, config=PLAIN, seeds=seeds).tolist():
            end = row.index(EOS) if EOS in row else len(row)
            assert all(token == PAD for token in row[end + 1 :])
            assert all(0 < token < 20 for token in row[:end])
            counts[end] += 1
    assert len(counts) > 2


def long_winded() -> tuple[MaskedDecoder, torch.Tensor]:
    """Return a decoder whose texts have different lengths, and three prompts of a right text."""
    torch.manual_seed(4)
    config = DecoderConfig(2, 24, 3, layer_masks=("row", "conv(3)"))
    model = MaskedDecoder(config, SequenceLayout(5, 3, 20), Vocabulary(20, 3, 5, 11, 2)).eval()
    with torch.no_grad():
        model.to_logits.bias[EOS] = 1.5
    return model, torch.cat([LEFT, torch.zeros(3, 9, dtype=torch.long), LEFT[:, :1]], dim=1)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_samples_that_have_ended_leave_the_batch_and_change_no_other(num_samples: int) -> None:
    model, prompt = long_winded()
    rows: list[int] = []
    model.layers[0].register_forward_hook(lambda _, given, out: rows.append(len(out)))
    seeds = list(range(3 * num_samples))
    together = generate_text(model, prompt, config=PLAIN, seeds=seeds)
    assert rows == [3, *sorted(rows[1:], reverse=True)] and min(rows) <= 1.5 * num_samples
    for at, seed in enumerate(seeds):
        alone = prompt[at // num_samples][None]
        found = generate_text(model, alone, config=PLAIN, seeds=[seed])
        assert torch.equal(together[at], found[0])


def test_prompts_of_several_lengths_share_a_batch() -> None:
    model, prompt = long_winded()
    known = torch.full((3, 19), TO_SAMPLE)
    known[1, :2], known[2, :6] = torch.tensor([7, 9]), torch.tensor([4, 5, 6, 7, 8, 9])
    together = generate_text(model, prompt, config=PLAIN, seeds=[1, 2, 3], known=known)
    for at, given in enumerate(known):
        alone = generate_text(
            model, prompt[at][None], config=PLAIN, seeds=[at + 1], known=given[None]
        )
        assert torch.equal(together[at], alone[0])
        is_given = given != TO_SAMPLE
        assert torch.equal(together[at][is_given], given[is_given])


def test_guidance_without_a_text_to_lead_away_from_is_refused() -> None:
    with pytest.raises(ValueError, match="unconditional"):
        generate_image(small_decoder(), LEFT, config=replace(PLAIN, guidance=2.0), seeds=[1, 2, 3])


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("guidance", -1.0)],
)
def test_zero_is_an_error_and_not_off(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(PLAIN, **{field: value})


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "guidance"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e40, -1e-40])
def test_no_number_of_a_config_makes_logits_that_are_none(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be ") as error:
        replace(PLAIN, **{field: value})
    assert "\n" not in str(error.value)
