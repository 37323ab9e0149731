"""The language model: Hugging Face's numbers, padding on either side, and its cache."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.layers.multi_head import multi_head_attention
from rudolph.models.lm.decode import decode_tokens
from rudolph.models.lm.language_model import LanguageModel, LanguageModelConfig
from rudolph.models.reference import from_reference, to_reference

LLAMA_TINY = LanguageModelConfig(
    vocab_size=37,
    hidden_size=12,
    num_layers=3,
    num_heads=6,
    num_key_value_heads=2,
    head_size=4,
    mlp_size=20,
)
PALM_TINY = replace(
    LLAMA_TINY,
    num_heads=3,
    num_key_value_heads=1,
    block="parallel",
    norm="layer",
    tied_embeddings=True,
)
VICUNA_7B = LanguageModelConfig()
VICUNA_13B = replace(
    VICUNA_7B,
    hidden_size=5120,
    num_layers=40,
    num_heads=40,
    num_key_value_heads=40,
    mlp_size=13_824,
)
tiny = pytest.mark.parametrize("config", [LLAMA_TINY, PALM_TINY], ids=["llama", "palm"])


def model_of(config: LanguageModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def llama_part(parity: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The language model inside the golden LLaVA, as a LLaMA checkpoint of its own."""
    golden = parity("llava")
    weights = {
        key.replace("model.language_model.", "model."): value
        for key, value in golden.weights.items()
        if "language_model" in key or key.startswith("lm_head")
    }
    return golden.config["text_config"], weights


def test_a_text_only_row_equals_hugging_face(parity) -> None:
    config, weights = llama_part(parity)
    golden = parity("llava").io
    mask = golden["attention_mask"][2:].bool()
    assert not (golden["input_ids"][2] == 69).any()
    logits = from_reference("llama", config, weights)(golden["input_ids"][2:], attention_mask=mask)
    assert_near(logits[mask], golden["logits"][2:][mask])


def test_a_llama_checkpoint_comes_back(parity) -> None:
    config, weights = llama_part(parity)
    family, actual, tensors = to_reference(from_reference("llama", config, weights))
    assert family == "llama" and tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[key], value) for key, value in weights.items())
    from_reference("llama", actual, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window must be None, got 4096"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be default, got 'yarn'"),
        ({"tie_word_embeddings": True}, "lm_head.weight must equal model.embed_tokens.weight"),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_key_value_heads"),
        ({"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight"),
    ],
)
def test_a_llama_that_does_not_fit_is_named_in_one_line(parity, change, words: str) -> None:
    config, weights = llama_part(parity)
    with pytest.raises(ValueError, match=words) as caught:
        from_reference("llama", config | change, weights)
    assert "\n" not in str(caught.value)


@tiny
def test_attention_equals_a_loop_over_queries(config: LanguageModelConfig) -> None:
    """Scores, mask, softmax and mean of one query at a time, each key head repeated."""
    model, x = model_of(config), torch.randn(2, 5, 12)
    layer, context = model.layers[0].self_attn, model.context(x, None, None)
    size, groups = config.head_size, config.num_heads // config.num_key_value_heads
    heads = {
        name: getattr(layer, name)(x).view(2, 5, -1, size)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    angle = torch.arange(5.0)[:, None] * 10_000.0 ** (-torch.arange(0.0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angle), angle)  # channel i is real, i + H / 2 imaginary
    for name in ("q_proj", "k_proj"):
        pairs = torch.complex(*heads[name].chunk(2, -1)) * turn[:, None]
        heads[name] = torch.cat([pairs.real, pairs.imag], -1)
    out = torch.zeros(2, 5, config.num_heads, size)
    for row in range(2):
        for head in range(config.num_heads):
            for at in range(5):
                query = heads["q_proj"][row, at, head]
                keys, values = (
                    heads[name][row, : at + 1, head // groups] for name in ("k_proj", "v_proj")
                )
                out[row, at, head] = (keys @ query / size**0.5).softmax(0) @ values
    assert_near(layer(x, context), layer.o_proj(out.flatten(2)))


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_per_sample_equals_each_sample_alone(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(3, 6, length, 4, generator=generator, dtype=dtype)
    key, value = torch.randn(2, 3, 2, 5, 4, generator=generator, dtype=dtype)
    mask = torch.rand(3, length, 5, generator=generator) < 0.5
    mask[..., 2] = True
    actual = multi_head_attention(query, key, value, mask)
    for row in range(3):
        part = slice(row, row + 1)
        alone = multi_head_attention(query[part], key[part], value[part], mask[row])
        torch.testing.assert_close(actual[part], alone)
    expected = F.scaled_dot_product_attention(query, key, value, mask[:, None], enable_gqa=True)
    torch.testing.assert_close(actual, expected.transpose(1, 2).flatten(2))


@tiny
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_changes_no_logit(config: LanguageModelConfig, side: str) -> None:
    model, tokens = model_of(config), tokens_of(3, 7)
    mask = torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate((7, 4, 2)):
        at = torch.arange(7)
        mask[row] = at >= 7 - length if side == "left" else at < length
        if side == "inside":
            mask[row, -1] = 1
    logits = model(tokens, attention_mask=mask)
    for row in range(3):
        alone = model(tokens[row : row + 1, mask[row].bool()])
        assert_near(logits[row : row + 1, mask[row].bool()], alone)
    assert logits.isfinite().all()


@tiny
@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1, 1), (4, 1, 1), (3, 3)])
def test_a_cache_changes_no_logit(
    config: LanguageModelConfig, steps: tuple[int, ...], is_padded: bool
) -> None:
    model, tokens = model_of(config), tokens_of(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    if is_padded:
        mask[1, 0] = mask[0, 2] = False
    cache, start, parts = model.new_cache(2, num_positions=6), 0, []
    for length in steps:
        now = slice(start, start + length)
        given = mask[:, now] if is_padded else None
        parts.append(model(tokens[:, now], attention_mask=given, cache=cache))
        start += length
    expected = model(tokens, attention_mask=mask)
    assert_near(torch.cat(parts, dim=1)[mask], expected[mask])
    with pytest.raises(ValueError, match="the cache holds 6 positions, got 7"):
        model(tokens[:, :1], cache=cache)


@tiny
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_decoding_of_a_padded_batch_equals_the_search_of_each_row(
    config: LanguageModelConfig, side: str
) -> None:
    model, tokens = model_of(config), tokens_of(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = side != "left"
    mask[1, 3:] = side != "right"
    actual = model.generate_greedily(tokens, num_tokens=4, attention_mask=mask)
    for row in range(2):
        sequence = tokens[row : row + 1, mask[row]]
        for _ in range(4):
            sequence = torch.cat([sequence, model(sequence)[:, -1].argmax(-1)[:, None]], dim=1)
        assert torch.equal(actual[row], sequence[0, -4:])


def test_a_row_that_ended_repeats_its_end_until_every_row_has() -> None:
    following = torch.tensor([1, 2, 3, 4, 5, 0, 0])  # the token after each
    steps = []

    def step(tokens: Tensor) -> Tensor:
        steps.append(tokens)
        return F.one_hot(following[tokens[:, 0]], 7).float()

    start = F.one_hot(torch.tensor([0, 2]), 7).float()
    tokens = decode_tokens(start, step, num_tokens=9, end_id=4)
    assert tokens.tolist() == [[0, 1, 2, 3, 4], [2, 3, 4, 4, 4]]
    assert len(steps) == 4
    tokens = decode_tokens(start, step, num_tokens=3)
    assert tokens.tolist() == [[0, 1, 2], [2, 3, 4]]
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        decode_tokens(start, step, num_tokens=0)


@tiny
def test_embeddings_take_the_place_of_tokens(config: LanguageModelConfig) -> None:
    model, tokens = model_of(config), tokens_of(2, 5)
    assert torch.equal(model(model.embed_tokens(tokens)), model(tokens))


@tiny
def test_a_later_token_changes_no_earlier_logit(config: LanguageModelConfig) -> None:
    model, tokens = model_of(config), tokens_of(1, 6)
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 37
    before, after = model(tokens), model(changed)
    assert_near(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(
    ("config", "count"), [(VICUNA_7B, 6_738_415_616), (VICUNA_13B, 13_015_864_320)]
)
def test_vicuna_has_its_published_number_of_parameters(
    config: LanguageModelConfig, count: int
) -> None:
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(value.numel() for value in model.parameters()) == count


@pytest.mark.parametrize("change", [{"num_layers": 0}, {"head_size": 3}, {"norm": "batch"}])
def test_a_config_that_cannot_be_built_is_refused(change: dict[str, Any]) -> None:
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value!r}"):
        replace(LLAMA_TINY, **change)


def test_an_attention_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 5\), got \(2, 4\)"):
        model_of(LLAMA_TINY)(tokens_of(2, 5), attention_mask=torch.ones(2, 4))
