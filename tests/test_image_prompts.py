"""Image prompts: given tokens stay, and tokens sampled before a given one do not depend on it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rudolph.generation.filters import TokenSamplingConfig, next_probabilities, sample_token
from rudolph.generation.generate import TO_SAMPLE, generate_image
from rudolph.generation.image_prompts import (
    SIDES,
    border_mask,
    known_indices,
    parse_borders,
    token_mask,
    variation_mask,
)
from rudolph.generation.noise import uniform_numbers
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary

LEFT = torch.tensor([[2, 7, 3, 0, 0], [2, 9, 11, 3, 0]])
SIDE, CODES = 3, 11
NUM_IMAGE = SIDE**2
PLAIN = TokenSamplingConfig()
SEEDS = [5, 6, 7, 8, 9, 10]
# ruDALL-E v2 (leading BOS) or not, and the guidance scale.
CASES = [(False, None), (True, None), (False, 2.5), (True, 0.3)]


def small_decoder(*, leading_bos: bool = False) -> MaskedDecoder:
    torch.manual_seed(2)
    config = DecoderConfig(
        2, 24, 3, layer_masks=("row",), last_layer_mask="conv(3)", leading_bos=leading_bos
    )
    layout = SequenceLayout(5, SIDE, 0 if leading_bos else 6)
    decoder = MaskedDecoder(config, layout, Vocabulary(20, 3, 5, CODES, 2)).eval()
    with torch.no_grad():
        decoder.to_logits.weight.mul_(3)
    return decoder


def small_vqgan() -> VQGAN:
    torch.manual_seed(1)
    quantizer = QuantizerConfig("vq", CODES, embedding_dim=4)
    vqgan = VQGAN(VQGANConfig(6, (4, 8), 1, (), 4, norm_groups=2, quantizer=quantizer)).eval()
    with torch.no_grad():
        # At initialisation, all cells are encoded almost alike.
        vqgan.quant_conv.weight.normal_(std=8)
        for parameter in vqgan.quantize.parameters():
            parameter.normal_()
    return vqgan


def sampled(model: MaskedDecoder, known: Tensor | None, guidance: float | None = None) -> Tensor:
    """Return three samples for each of two texts."""
    config = replace(PLAIN, guidance=guidance, guidance_kind="extrapolation")
    return generate_image(
        model, LEFT, config=config, seeds=SEEDS, unconditional=LEFT[0], known=known
    )


def prompt(given_tokens: Tensor, seed: int = 0) -> Tensor:
    """Return random indices for both texts, ``(2, I)``, where ``given_tokens`` (h, w) is true."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(CODES, (2, NUM_IMAGE), generator=generator)
    return torch.where(given_tokens.flatten(), indices, TO_SAMPLE)


def regions() -> dict[str, Tensor]:
    """Return masks of given tokens: borders, whole rows, a hole, a frame and arbitrary tokens."""
    hole = torch.zeros(SIDE, SIDE).bool()
    hole[1, 1:] = True
    return {
        "up": border_mask({"up": 1}, SIDE),
        "rows and a half": torch.arange(NUM_IMAGE).view(SIDE, SIDE) < 4,
        "frame": border_mask(dict.fromkeys(SIDES, 1), SIDE),
        "down and right": border_mask({"down": 1, "right": 1}, SIDE),
        "inside": ~hole,
        "outside": hole,
        "any": variation_mask(0.5, SIDE, torch.Generator().manual_seed(3)),
        "all but the last": torch.arange(NUM_IMAGE).view(SIDE, SIDE) < NUM_IMAGE - 1,
    }


@given(st.integers(1, 6), st.dictionaries(st.sampled_from(SIDES), st.integers(0, 6)))
def test_borders_are_the_references_rows_and_columns(side: int, borders: dict[str, int]) -> None:
    if max(borders.values(), default=0) > side:
        with pytest.raises(ValueError, match=f"expected 0 to {side} tokens, got"):
            border_mask(borders, side)
        return
    up, down, left, right = (borders.get(name, 0) for name in SIDES)
    expected = [
        [row < up or row >= side - down or column < left or column >= side - right]
        for row in range(side)
        for column in range(side)
    ]
    assert border_mask(borders, side).view(-1, 1).tolist() == expected
    written = ", ".join(f"{name} = {width}" for name, width in borders.items())
    if borders:
        assert parse_borders(written) == borders


def test_an_unknown_side_is_named() -> None:
    with pytest.raises(ValueError, match="borders: expected up, down, left, right, got 'top'"):
        border_mask({"top": 1}, SIDE)


@pytest.mark.parametrize(
    "text", ["", "up", "up=", "up=-1", "up=1.5", "=3", "up=1,", "up=1;left=2"]
)
def test_borders_that_are_no_borders_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"in tokens like up=4,left=2, got '"):
        parse_borders(text)


def test_a_side_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="each side once, got 'up=1,left=2,up=3'"):
        parse_borders("up=1,left=2,up=3")


def test_a_token_is_given_when_all_of_its_pixels_are() -> None:
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.8
    found = token_mask(mask, 4)
    for row in range(4):
        for column in range(4):
            pixels = mask[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            assert found[row, column] == all(pixels.flatten().tolist())
    assert 0 < found.sum() < 16
    for height, width in ((8, 10), (10, 8)):
        with pytest.raises(ValueError, match=f"multiples of 4 pixels, got {height} x {width}"):
            token_mask(torch.ones(height, width).bool(), 4)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_variation_draws_its_share_anew_and_keeps_less_the_larger_it_is(share: float) -> None:
    def stays(share: float, seed: int = 4) -> Tensor:
        return variation_mask(share, 40, torch.Generator().manual_seed(seed))

    assert stays(share).shape == (40, 40)
    # Four standard errors of a fraction of 1600 tokens.
    assert abs((~stays(share)).float().mean() - share) <= 4 * (share * (1 - share) / 1600) ** 0.5
    assert (stays(share) <= stays(share / 2)).all()
    assert torch.equal(stays(share), stays(share))
    assert share == 1 or not torch.equal(stays(share), stays(share, seed=5))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected above 0 and at most 1, got"):
        variation_mask(share, 4, torch.Generator())


@pytest.mark.parametrize("crop_first", [False, True])
def test_a_image_is_read_where_it_is_given(crop_first: bool) -> None:
    vqgan, stays = small_vqgan(), border_mask({"up": 1, "left": 1}, SIDE)
    image = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = known_indices(vqgan, image, stays, crop_first=crop_first)
    assert torch.equal(found == TO_SAMPLE, ~stays.flatten())
    whole = vqgan.encode_indices(image[None])[0]
    assert len(whole.unique()) > 3
    assert crop_first or torch.equal(found[stays.flatten()], whole[stays.flatten()])
    pixels = stays.repeat_interleave(2, 0).repeat_interleave(2, 1)
    changed = torch.where(pixels, image, 1 - image)
    again = known_indices(vqgan, changed, stays, crop_first=crop_first)
    assert torch.equal(again, found) == crop_first
    everything = torch.ones(SIDE, SIDE).bool()
    assert torch.equal(known_indices(vqgan, image, everything, crop_first=crop_first), whole)


def test_a_image_is_read_in_the_precision_of_the_vqgan() -> None:
    vqgan, stays = small_vqgan(), border_mask({"up": 2}, SIDE)
    image = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = known_indices(vqgan, image, stays)
    found = known_indices(vqgan.to(torch.bfloat16), image, stays)
    assert (found != expected).float().mean() < 0.3


def test_a_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(3, 6, 6\), got \(3, 6, 8\)"):
        known_indices(small_vqgan(), torch.rand(3, 6, 8), border_mask({"up": 1}, SIDE))


@pytest.mark.parametrize(
    ("region", "leading_bos", "guidance"),
    [(name, *case) for name, case in zip(regions(), CASES * 2, strict=True)]
    + [("frame", *case) for case in CASES],
)
def test_given_tokens_stay_and_the_rest_is_as_full_passes_draw_it(
    region: str, leading_bos: bool, guidance: float | None
) -> None:
    model, known = small_decoder(leading_bos=leading_bos), prompt(regions()[region])
    found = sampled(model, known, guidance)
    rows = known.repeat_interleave(3, dim=0)
    assert torch.equal(found[rows != TO_SAMPLE], rows[rows != TO_SAMPLE])
    assert ((found >= 0) & (found < CODES)).all()
    uniform = uniform_numbers(SEEDS, NUM_IMAGE)
    texts = [LEFT.repeat_interleave(3, dim=0), LEFT[:1].expand(6, -1)]
    config = replace(PLAIN, guidance=guidance)
    drawn = rows[:, :0]
    for step in range(NUM_IMAGE):
        sequences = (torch.cat([text, drawn], dim=1) for text in texts)
        logits = [model.image_logits(model.hidden(each)[:, -1])[:, :CODES] for each in sequences]
        token = sample_token(next_probabilities(logits[0], config, logits[1]), uniform[:, step])
        token = torch.where(rows[:, step] == TO_SAMPLE, token, rows[:, step])
        drawn = torch.cat([drawn, token[:, None]], dim=1)
    assert torch.equal(found, drawn)


@pytest.mark.parametrize("region", ["frame", "down and right", "inside", "any"])
def test_what_is_drawn_before_a_given_token_does_not_depend_on_it(region: str) -> None:
    model, stays = small_decoder(), regions()[region]
    first, other = (prompt(stays, seed) for seed in (0, 1))
    places = stays.flatten().nonzero().flatten().tolist()
    expected = sampled(model, first)
    for place in (places[1], places[-1]):
        mixed = torch.where(torch.arange(NUM_IMAGE) < place, first, other)
        mixed[:, place] = torch.where(first[:, place] == 0, 1, 0)
        found = sampled(model, mixed)
        assert torch.equal(found[:, :place], expected[:, :place])
        assert not (found[:, place] == expected[:, place]).any()
        assert place == NUM_IMAGE - 1 or not torch.equal(
            found[:, place + 1 :], expected[:, place + 1 :]
        )


@pytest.mark.parametrize(("leading_bos", "guidance"), CASES)
@pytest.mark.parametrize("region", ["rows and a half", "frame", "all but the last"])
def test_leading_tokens_read_with_the_prompt_equal_those_fed_one_by_one(
    region: str, leading_bos: bool, guidance: float | None, monkeypatch
) -> None:
    model, known = small_decoder(leading_bos=leading_bos), prompt(regions()[region])
    lengths, hidden = [], model.hidden

    def watched(tokens: Tensor, cache: object = None) -> Tensor:
        lengths.append(tokens.shape[1])
        return hidden(tokens, cache)

    monkeypatch.setattr(model, "hidden", watched)
    fast = sampled(model, known, guidance)
    free = (known[0] == TO_SAMPLE).nonzero().flatten()
    # Given tokens between free positions are read once, together with the token before them.
    assert lengths == [5 + int(free[0]), *free.diff().tolist()]
    lengths.clear()
    # In one batch with a prompt that starts with a free token, no token is read with the texts.
    beside = torch.stack([known[1], torch.full((NUM_IMAGE,), TO_SAMPLE)])
    slow = sampled(model, beside, guidance)
    assert lengths == [5] + [1] * (NUM_IMAGE - 1)
    again = sampled(model, known[1].expand(2, -1), guidance)
    assert torch.equal(slow[:3], again[:3])
    assert torch.equal(fast[3:], again[3:])


@pytest.mark.parametrize(("leading_bos", "guidance"), CASES)
def test_nothing_is_computed_when_all_is_given(
    leading_bos: bool, guidance: float | None, monkeypatch
) -> None:
    model, known = small_decoder(leading_bos=leading_bos), prompt(torch.ones(SIDE, SIDE).bool())
    monkeypatch.setattr(model, "hidden", None)
    assert torch.equal(sampled(model, known, guidance), known.repeat_interleave(3, dim=0))


@pytest.mark.parametrize(("leading_bos", "guidance"), CASES)
def test_a_prompt_without_a_given_token_is_none(leading_bos: bool, guidance: float | None) -> None:
    model = small_decoder(leading_bos=leading_bos)
    nothing = prompt(border_mask({"up": 0}, SIDE))
    assert torch.equal(sampled(model, nothing, guidance), sampled(model, None, guidance))
