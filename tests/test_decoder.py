"""The decoder: equal to the reference, causal, and unchanged by the cache."""

from dataclasses import replace

import pytest
import torch

from rudolph.models.layers import attention as attention_module
from rudolph.models.layers.attention import (
    PB_RELAX_MAXIMA,
    PB_RELAX_SCALE,
    KeyValue,
    apply_pb_relax,
    attention,
)
from rudolph.models.layers.kv_cache import select_keys
from rudolph.models.reference import from_reference
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.rudolph.scoring import segment_labels
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.masks import mask_table, parse_mask

CASES = ["rudolph_350m_like", "rudolph_plain_norms", "rudolph_v1_no_specials"]
LAYOUT = SequenceLayout(5, 3, 4)
VOCABULARY = Vocabulary(20, 3, 5, 11, 2)
SMALL = DecoderConfig(num_layers=4, hidden_size=24, num_heads=3, last_layer_mask="conv(3)")
MASKS = ["causal", "row", "row_block", "column", "conv(3)", "conv_torus(3)"]


def small_decoder(config: DecoderConfig = SMALL) -> MaskedDecoder:
    torch.manual_seed(1)
    return MaskedDecoder(config, LAYOUT, VOCABULARY).eval()


def random_tokens(batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, 20, (batch, 5), generator=generator)
    image = torch.randint(0, 11, (batch, 9), generator=generator)
    return torch.cat([left, image, torch.randint(0, 20, (batch, 4), generator=generator)], dim=1)


def reference(parity, case: str) -> MaskedDecoder:
    golden = parity(case)
    return from_reference("rudolph", golden.config, golden.weights).eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_state_equal_the_reference(parity, case: str) -> None:
    model, io = reference(parity, case), parity(case).io
    tokens = io["tokens"]
    prefixes = {"logits": 27, "logits_left": 6, "logits_left_image": 22}
    for name, length in prefixes.items():
        torch.testing.assert_close(model(tokens[:, :length]), io[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.run_layers(tokens), io["hidden_last"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_switch_that_hides_left_text_equals_the_reference(parity, case: str) -> None:
    golden, model = parity(case), reference(parity, case)
    model.config = replace(model.config, right_attends_left=False)
    model.register_masks()
    torch.testing.assert_close(
        model(golden.io["tokens"]), golden.io["logits_right_without_left"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("right_attends_left", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_a_later_token_never_changes_an_earlier_logit(mask: str, right_attends_left: bool) -> None:
    config = replace(
        SMALL, layer_masks=(mask,), last_layer_mask=None, right_attends_left=right_attends_left
    )
    model, tokens = small_decoder(config), random_tokens(2)
    logits = model(tokens)
    for position in range(1, LAYOUT.length):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 11
        assert torch.allclose(model(changed)[:, :position], logits[:, :position], atol=1e-6)


@pytest.mark.parametrize("right_attends_left", [True, False])
@pytest.mark.parametrize("mask", [*MASKS, "mixed"])
@pytest.mark.parametrize("steps", [(1,) * 18, (5, 9, 4), (3, 1, 6, 8)], ids=str)
def test_cached_logits_equal_uncached_logits(
    mask: str, right_attends_left: bool, steps: tuple[int, ...]
) -> None:
    pattern = SMALL.layer_masks if mask == "mixed" else (mask,)
    config = replace(SMALL, layer_masks=pattern, right_attends_left=right_attends_left)
    model, tokens = small_decoder(config), random_tokens(3)
    cache = model.new_cache(3)
    parts, start = [], 0
    with torch.no_grad():
        for step in steps:
            parts.append(model.to_logits(model.hidden(tokens[:, start : start + step], cache)))
            start += step
        whole = model(tokens)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("right_attends_left", [True, False])
@pytest.mark.parametrize("mask", [*MASKS, "mixed"])
@pytest.mark.parametrize(("given", "steps"), [(5, (1,) * 13), (1, (3, 2, 12)), (15, (2, 1))])
def test_a_repeated_cache_serves_samples_as_if_each_had_its_own_prefix(
    mask: str, right_attends_left: bool, given: int, steps: tuple[int, ...]
) -> None:
    pattern = SMALL.layer_masks if mask == "mixed" else (mask,)
    config = replace(SMALL, layer_masks=pattern, right_attends_left=right_attends_left)
    model = small_decoder(config)
    tokens = random_tokens(6)
    # All samples of a prompt start with the same tokens.
    tokens[:, :given] = tokens[::3, :given].repeat_interleave(3, dim=0)
    with torch.no_grad():
        prompts = model.new_cache(2, num_positions=given)
        model.hidden(tokens[::3, :given], prompts)
        cache = prompts.expand_samples(3, num_positions=sum(steps))
        parts, start = [], given
        for step in steps:
            parts.append(model.hidden(tokens[:, start : start + step], cache))
            start += step
        expected = model.hidden(tokens)[:, given:start]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)
    assert (prompts.length, cache.length) == (given, start)


@pytest.mark.parametrize("right_attends_left", [True, False])
@pytest.mark.parametrize("mask", [*MASKS, "mixed"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_are_the_masks(mask: str, right_attends_left: bool) -> None:
    pattern = SMALL.layer_masks if mask == "mixed" else (mask,)
    config = replace(SMALL, layer_masks=pattern, right_attends_left=right_attends_left)
    model, tokens = small_decoder(config), random_tokens(3)
    with torch.no_grad():
        for length in (5, 14, 18):
            model.has_block_masks = False
            expected = model(tokens[:, :length])
            model.has_block_masks = True
            torch.testing.assert_close(model(tokens[:, :length]), expected, atol=1e-5, rtol=0)
    model.train()
    with pytest.raises(ValueError, match=r"block masks need model.attention_dropout 0, got 0.1"):
        model(tokens)


def test_a_position_that_is_forgotten_leaves_no_trace() -> None:
    model, tokens = small_decoder(), random_tokens(4)
    with torch.no_grad():
        cache = model.new_cache(2, num_positions=6)
        model.hidden(tokens[:2, :6], cache)
        cache = cache.expand_samples(2, num_positions=5)
        model.hidden(tokens[:, 6:11].flip(1), cache)
        cache.length = 6
        found = model.hidden(tokens[:, 6:11], cache)
        sequences = torch.cat([tokens[:2, :6].repeat_interleave(2, dim=0), tokens[:, 6:11]], dim=1)
        expected = model.hidden(sequences)[:, 6:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_cache_goes_on_with_the_samples_that_are_kept() -> None:
    model, tokens = small_decoder(), random_tokens(6)
    tokens[:, :4] = tokens[::2, :4].repeat_interleave(2, dim=0)
    with torch.no_grad():
        cache = model.new_cache(3, num_positions=4)
        model.hidden(tokens[::2, :4], cache)
        cache = cache.expand_samples(2, num_positions=3)
        model.hidden(tokens[:, 4:6], cache)
        cache = cache.select(torch.tensor([0, 2]), torch.tensor([[1], [0]]))
        found = model.hidden(tokens[[1, 4], 6:7], cache)
        expected = model.hidden(tokens[[1, 4], :7])[:, 6:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
def test_a_step_reads_what_its_mask_needs_and_little_more(mask: str) -> None:
    layout = SequenceLayout(left_text_length=5, image_tokens_per_dim=8, right_text_length=3)
    table = mask_table(parse_mask(mask), layout)
    for position in range(5, layout.length):
        # Keys of the prompt are read separately from a sample's own, as in sampling.
        row = table[position : position + 1, 5 : position + 1]
        read = select_keys(row)
        numbers = torch.arange(position - 4)[read.at]
        seen = numbers if read.mask is None else numbers[read.mask[0]]
        assert torch.equal(seen, row[0].nonzero().flatten())
        assert len(numbers) <= 3 * len(seen)
        if mask in ("row", "column") and position < layout.right_text_start:
            assert len(numbers) == len(seen) <= 9


def test_segment_logits_are_slices_of_all_logits() -> None:
    model, tokens = small_decoder(), random_tokens(2)
    hidden, logits = model.hidden(tokens), model(tokens)
    text = VOCABULARY.text_size
    torch.testing.assert_close(model.text_logits(hidden), logits[..., :text])
    torch.testing.assert_close(model.image_logits(hidden), logits[..., text:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pb_relax", ["row", "matrix", None])
def test_half_precision_attention_equals_the_fused_kernel(
    dtype: torch.dtype, pb_relax: str | None
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(6, 7, 8) for _ in range(3))
    mask = torch.ones(7, 7).tril().bool()
    expected = attention(query, [KeyValue(key, value, mask)], pb_relax=None, dropout=0.0)
    half = [tensor.to(dtype) for tensor in (query, key, value)]
    seen = [KeyValue(*half[1:], mask)]
    found = attention(half[0], seen, pb_relax=pb_relax, dropout=0.0)
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("masks", [None, "one", "per sample"])
def test_short_sequences_attend_as_in_the_fused_kernel(
    masks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [torch.randn(6, 11, 5, requires_grad=True) for _ in range(3)]
    shape = (3, 11, 11) if masks == "per sample" else (11, 11)
    mask = None if masks is None else (torch.rand(shape) < 0.5) | torch.eye(11, dtype=torch.bool)
    results = []
    for longest in (attention_module.MAX_UNFUSED_LENGTH, 0):
        monkeypatch.setattr(attention_module, "MAX_UNFUSED_LENGTH", longest)
        query, key, value = leaves
        out = attention(query, [KeyValue(key, value, mask)], pb_relax=None, dropout=0.0)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-5, rtol=1e-5)


def test_pb_relax_survives_scores_that_overflow_float16() -> None:
    query = torch.full((1, 2, 4), 400.0, dtype=torch.float16)
    key = query.clone()
    key[..., 1, :] = -400.0
    value = torch.eye(2, 4, dtype=torch.float16)[None]
    mask = torch.ones(2, 2).bool()
    plain = attention(query, [KeyValue(key, value, mask)], pb_relax=None, dropout=0.0)
    assert not torch.isfinite(plain).all()
    for maximum in PB_RELAX_MAXIMA:
        found = attention(query, [KeyValue(key, value, mask)], pb_relax=maximum, dropout=0.0)
        assert torch.equal(found[0, 0], value[0, 0])


@pytest.mark.parametrize("maximum", PB_RELAX_MAXIMA)
@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_pb_relax_is_exact_in_float32(maximum: str, scale: float) -> None:
    """The probabilities equal those of a plain softmax, even for scores beyond float16."""
    scores = scale * torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    scores[1, 2, 4:] = -torch.inf
    found = apply_pb_relax(scores / PB_RELAX_SCALE, maximum).softmax(-1)
    torch.testing.assert_close(found, scores.softmax(-1), atol=1e-6, rtol=1e-4)


def test_float16_keeps_a_row_far_below_the_greatest_score_by_its_own_maximum() -> None:
    """Relative to the matrix maximum, its scores are thousands, eight apart in float16."""
    scores = torch.tensor([[[9000.0, 0.0], [1.0, 3.0]]])
    small = (scores / PB_RELAX_SCALE).half()
    expected = scores.softmax(-1)
    by_row, by_matrix = (
        apply_pb_relax(small, maximum).softmax(-1).float() for maximum in PB_RELAX_MAXIMA
    )
    torch.testing.assert_close(by_row, expected, atol=1e-2, rtol=0)
    assert (by_matrix - expected).abs().max() > 0.1


def test_embedding_gradient_is_the_only_thing_that_its_share_changes() -> None:
    grads = []
    for share in (1.0, 0.1):
        model = small_decoder(replace(SMALL, embedding_gradient=share))
        model(random_tokens(2)).square().mean().backward()
        grads.append((model.text_embedding.weight.grad, model.layers[0].to_qkv.weight.grad))
    torch.testing.assert_close(grads[1][0], 0.1 * grads[0][0], atol=1e-8, rtol=1e-3)
    torch.testing.assert_close(grads[1][1], grads[0][1], atol=1e-7, rtol=1e-3)


def test_a_sequence_that_is_too_long_is_told() -> None:
    with pytest.raises(ValueError, match="18 tokens, got 19"):
        small_decoder()(torch.zeros(1, 19, dtype=torch.long))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("hidden_size", 25),
        ("layer_masks", ()),
        ("layer_masks", ("conv",)),
        ("last_layer_mask", "convolution(3)"),
        ("gelu", "relu"),
        ("output_dropout", 1.5),
        ("token_init_std", 0.0),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: value})


def test_embeddings_that_start_from_codes_are_as_far_apart_as_the_codes() -> None:
    layout, codebook_size = SequenceLayout(4, 3, 4), 90
    vocabulary = Vocabulary(20, 4, layout.left_text_length, codebook_size)
    torch.manual_seed(0)
    model = MaskedDecoder(DecoderConfig(1, 48, 3, token_init_std=0.7), layout, vocabulary)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    # One dimension is a hundred times wider than the others, and one is constant.
    codes = torch.randn(codebook_size, 6) * torch.tensor([100, 1, 1, 1, 1, 0])
    model.init_from_codebook(codes)
    found = model.image_embedding.weight.detach()
    even = codes[:, :5] / codes[:, :5].std(0)
    near = torch.corrcoef(torch.stack([torch.pdist(even), torch.pdist(found[: len(codes)])]))
    before = torch.pdist(plain["image_embedding.weight"][: len(codes)])
    assert (
        near[0, 1]
        > 0.7
        > 0.2
        > abs(torch.corrcoef(torch.stack([torch.pdist(even), before])))[0, 1]
    )
    assert found[: len(codes)].std().item() == pytest.approx(0.7, rel=0.2)
    changed = {name for name, value in model.state_dict().items() if (value != plain[name]).any()}
    assert changed == {"image_embedding.weight"}


def test_normed_queries_and_keys_have_no_size_of_their_own() -> None:
    model, tokens = small_decoder(replace(SMALL, qk_norm=True)), random_tokens(3)
    expected, cache = model(tokens), model.new_cache(3)
    with torch.inference_mode():
        parts = [model.hidden(part, cache) for part in tokens.split([6, 1, 4, 7], dim=1)]
        torch.testing.assert_close(model.to_logits(torch.cat(parts, dim=1)), expected)
    for layer in model.layers:
        for parameter in layer.to_qkv.parameters():
            parameter.data[:48] *= 300  # queries and keys
    torch.testing.assert_close(model(tokens), expected, atol=1e-3, rtol=0)
    model = small_decoder(replace(SMALL, qk_norm=False))
    assert not any("query_norm" in name for name in model.state_dict())


def test_one_padding_id_serves_all_positions_where_none_has_its_own() -> None:
    tokens = random_tokens(2).clamp(min=1)
    tokens[:, 3:5] = 0
    for has_own in (True, False):
        model = small_decoder(replace(SMALL, positional_padding=has_own))
        model(tokens).sum().backward()
        used = model.text_embedding.weight.grad.abs().sum(1) > 0
        assert used[[26, 27]].tolist() == [has_own] * 2 and used[0] == (not has_own)
        labels = segment_labels(model, tokens)["left_text"][1]
        assert labels[:, -2:].tolist() == [[26, 27] if has_own else [0, 0]] * 2


def test_decoders_that_differ_in_a_table_begin_alike_in_all_else_where_asked() -> None:
    def start(is_paired: bool, bpe_size: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        config = replace(SMALL, init_by_name=is_paired)
        model = MaskedDecoder(config, LAYOUT, replace(VOCABULARY, bpe_size=bpe_size))
        if is_paired:
            model.init_by_name(lambda name: len(name) + sum(map(ord, name)))
        return model.state_dict()

    for is_paired in (True, False):
        first, second = start(is_paired, 20), start(is_paired, 23)
        is_same = {
            name: torch.equal(first[name], second[name])
            for name in ("layers.2.mlp_in.weight", "row_position.weight", "layers.0.to_qkv.bias")
        }
        assert set(is_same.values()) == {is_paired}
    stds = start(True, 400)
    assert abs(stds["text_embedding.weight"].std().item() - SMALL.token_init_std) < 0.05
    assert stds["left_position.weight"].std().item() < 2 * SMALL.position_init_std
