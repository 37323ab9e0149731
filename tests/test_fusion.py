"""Media masks, resampler and gated cross-attention: against loops, and what they ignore."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rudolph.models.fusion.cross_attention import CrossAttentionConfig, GatedCrossAttentionBlock
from rudolph.models.fusion.media_mask import (
    MEDIA_RULES,
    TagCounts,
    check_tags,
    count_tags,
    media_mask,
    number_media,
)
from rudolph.models.fusion.resampler import PerceiverResampler, ResamplerConfig
from rudolph.models.layers.feed_forward import feed_forward

TAG, END = 3, 2
RESAMPLER = ResamplerConfig(width=10, num_layers=2, num_latents=3, num_heads=2, head_size=4)
both_rules = pytest.mark.parametrize("rule", MEDIA_RULES)
TEXTS = st.lists(st.sampled_from([0, 1, END, TAG]), min_size=1, max_size=12)


def visible_media(text: list[int], present: list[bool], rule: str) -> list[list[bool]]:
    """Return the media that each token attends to, one token after another."""
    order = [media for media, is_present in enumerate(present) if is_present]
    lines, seen = [], []
    for token in text:
        if token == TAG:
            seen.append(order.pop(0))
        chosen = seen[-1:] if rule == "immediate" else seen
        lines.append([media in chosen for media in range(len(present))])
        if token == END:
            seen = []
    return lines


def mask_of(text: Tensor, present: Tensor, rule: str) -> Tensor:
    return media_mask(rule, count_tags(text == TAG, text == END), number_media(present))


@both_rules
@given(TEXTS, st.lists(st.booleans(), max_size=4))
def test_a_mask_equals_a_walk_through_the_text(
    rule: str, text: list[int], gaps: list[bool]
) -> None:
    """With absent media at any place and documents packed into one row."""
    present = [*gaps, *[True] * max(text.count(TAG) - sum(gaps), 1)]
    actual = mask_of(torch.tensor([text]), torch.tensor([present]), rule)
    assert actual[0].tolist() == visible_media(text, present, rule)


@both_rules
@given(TEXTS, st.integers(0, 12))
def test_a_text_in_two_steps_has_the_mask_of_the_whole(
    rule: str, text: list[int], at: int
) -> None:
    tokens, media = torch.tensor([text, text[::-1]]), torch.arange(1, 13).expand(2, -1)
    counts: TagCounts | None = None
    parts = []
    for step in (tokens[:, :at], tokens[:, at:]):
        if step.shape[1]:
            counts = count_tags(step == TAG, step == END, counts)
            parts.append(media_mask(rule, counts, media))
    whole = media_mask(rule, count_tags(tokens == TAG, tokens == END), media)
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_more_tags_than_media_are_an_error_that_names_the_row() -> None:
    counts = count_tags(torch.tensor([[1, 0, 1], [1, 1, 1]]).bool())
    check_tags(counts, torch.tensor([[1, 2, 0], [1, 2, 3]]))
    with pytest.raises(ValueError, match=r"row 1: expected at most 2 media tags, .*, got 3"):
        check_tags(counts, torch.tensor([[1, 2, 0], [1, 2, 0]]))


def block_of(gate: str = "scalar", media_width: int = 10) -> GatedCrossAttentionBlock:
    torch.manual_seed(0)
    config = CrossAttentionConfig(num_heads=2, head_size=4, gate=gate)
    block = GatedCrossAttentionBlock(14, media_width, config)
    torch.nn.init.normal_(block.attn_gate)
    torch.nn.init.normal_(block.ff_gate)
    return block


@both_rules
def test_text_before_its_first_tag_gets_exactly_nothing_from_media(rule: str) -> None:
    attention = block_of().attn
    x, media = torch.randn(2, 6, 14), torch.randn(2, 2 * 3, 10)
    text = torch.tensor([[0, 0, TAG, 0, TAG, 0], [TAG, 0, 0, TAG, 0, 0]])
    mask = mask_of(text, torch.ones(2, 2).bool(), rule).repeat_interleave(3, dim=-1)
    out = attention(x, attention.keys_values(media), mask)
    assert (out[0, :2] == 0).all()
    assert (out[0, 2:] != 0).any(-1).all() and (out[1] != 0).any(-1).all()


@both_rules
def test_only_the_media_that_the_rule_names_change_a_position(rule: str) -> None:
    block = block_of()
    x, media = torch.randn(1, 7, 14), torch.randn(1, 3 * 2, 10)
    text = torch.tensor([[0, TAG, 0, TAG, 0, TAG, 0]])
    mask = mask_of(text, torch.ones(1, 3).bool(), rule).repeat_interleave(2, dim=-1)
    before = block(x, block.attn.keys_values(media), mask)
    changed = media.clone()
    changed[:, 2:4] += 1.0  # the second media
    after = block(x, block.attn.keys_values(changed), mask)
    differs = (before != after).any(-1)[0].tolist()
    assert differs == [False] * 3 + [True] * 2 + [rule == "all_previous"] * 2


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_a_new_block_is_the_identity_and_only_its_gates_get_gradients(gate: str) -> None:
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(14, 10, CrossAttentionConfig(2, 4, gate=gate))
    x, media = torch.randn(2, 5, 14), torch.randn(2, 4, 10)
    out = block(x, block.attn.keys_values(media))
    assert torch.equal(out, x)
    (out * torch.randn_like(out)).sum().backward()
    for name, value in block.named_parameters():
        assert bool(value.grad.any()) == name.endswith("_gate"), name


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("media_width", [10, 14])
def test_blocks_and_resamplers_have_the_parameters_of_their_formulas(
    gate: str, media_width: int
) -> None:
    """Formulas of the facts that the papers' tables follow: D width, I = heads * size."""
    width, inner = 14, 8
    count = 2 * width + 2 * width * inner + 2 * media_width * inner + 2 * width + 8 * width**2
    block = block_of(gate, media_width)
    gates = 2 if gate == "scalar" else 2 * width
    assert sum(value.numel() for value in block.parameters()) == count + gates
    width, latents, layers = 10, 3, 2
    count = latents * width + 2 * width
    count += layers * (4 * width + 4 * width * inner + 2 * width + 8 * width**2)
    assert sum(value.numel() for value in PerceiverResampler(RESAMPLER).parameters()) == count
    with_embeddings = replace(RESAMPLER, num_media_embeddings=4, num_frame_embeddings=5)
    actual = sum(value.numel() for value in PerceiverResampler(with_embeddings).parameters())
    assert actual == count + (4 + 5) * width


def resampler_of(config: ResamplerConfig = RESAMPLER) -> PerceiverResampler:
    torch.manual_seed(1)
    return PerceiverResampler(config)


def test_a_resampler_equals_a_loop_over_its_definition() -> None:
    """One media, one head and one latent at a time, with pre-norms and both residuals."""
    model, features = resampler_of(), torch.randn(2, 3, 5, 10)
    actual = model(features)
    for row in range(2):
        for media in range(3):
            latents = model.latents
            for attention, mlp in model.layers:
                queries = attention.norm_latents(latents)
                inputs = torch.cat([attention.norm_media(features[row, media]), queries])
                query = attention.to_q(queries).view(3, 2, 4)
                key, value = attention.to_kv(inputs).view(8, 2, 2, 4).unbind(1)
                heads = [
                    (query[:, head] @ key[:, head].T / 2).softmax(-1) @ value[:, head]
                    for head in range(2)
                ]
                latents = latents + attention.to_out(torch.cat(heads, dim=-1))
                latents = latents + mlp(latents)
            torch.testing.assert_close(actual[row, media], model.norm(latents))


def test_a_resampler_reads_a_set_of_patches() -> None:
    model, features = resampler_of(), torch.randn(1, 2, 6, 10)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(model(features[:, :, order]), model(features))


def test_padded_patches_change_nothing_and_latents_stay_visible() -> None:
    model, features = resampler_of(), torch.randn(2, 2, 5, 10)
    mask = torch.ones(2, 2, 5).bool()
    mask[0, 1, 2:] = mask[1, 0, 0] = False
    latents = model(features, mask)
    torch.testing.assert_close(latents[0, 1], model(features[:1, 1:, :2])[0, 0])
    torch.testing.assert_close(latents[1, 0], model(features[1:, :1, 1:])[0, 0])
    torch.testing.assert_close(latents[1, 1], model(features)[1, 1])
    assert model(features, torch.zeros_like(mask)).isfinite().all()


def test_frames_and_media_take_the_embeddings_of_their_places() -> None:
    config = replace(RESAMPLER, num_media_embeddings=2, num_frame_embeddings=3)
    model, videos = resampler_of(config), torch.randn(1, 2, 3, 5, 10)
    plain = resampler_of(RESAMPLER)
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "emb" not in name}
    )
    embedded = videos + model.frame_embs[:, None] + model.media_pos_emb[:, None]
    torch.testing.assert_close(model(videos), plain(embedded))
    images = videos[:, :, 0]
    torch.testing.assert_close(model(images), plain(images + model.media_pos_emb))


def test_more_media_or_frames_than_embeddings_are_an_error() -> None:
    config = replace(RESAMPLER, num_media_embeddings=2, num_frame_embeddings=3)
    with pytest.raises(ValueError, match="num_media_embeddings is 2, got 3 media"):
        resampler_of(config)(torch.randn(1, 3, 5, 10))
    with pytest.raises(ValueError, match="num_frame_embeddings is 3, got 4 frames"):
        resampler_of(config)(torch.randn(1, 2, 4, 5, 10))


def test_configs_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ValueError, match="num_latents must be at least 1, got 0"):
        replace(RESAMPLER, num_latents=0)
    with pytest.raises(ValueError, match="gate must be one of scalar, vector, got 'none'"):
        CrossAttentionConfig(gate="none")
    with pytest.raises(ValueError, match="head_size must be at least 1, got 0"):
        CrossAttentionConfig(head_size=0)


def test_a_feed_forward_has_a_norm_and_no_biases() -> None:
    x = torch.randn(2, 14)
    layer = feed_forward(14, 3)
    expected = torch.nn.functional.gelu(layer[0](x) @ layer[1].weight.T) @ layer[3].weight.T
    torch.testing.assert_close(layer(x), expected)
    assert [tuple(value.shape) for value in layer.parameters()] == [
        (14,),
        (14,),
        (42, 14),
        (14, 42),
    ]
