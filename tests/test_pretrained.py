"""Reference checkpoints: the same outputs, keys and counts, and a round trip of the file."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rudolph.models.reference import empty_model, from_reference, to_reference
from rudolph.models.reference.family import StoredMaskWarning
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.vqgan.model import VQGAN, VQGANConfig, haar_filters, inverse_haar
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.masks import mask_table, parse_mask, right_without_left
from rudolph.training.losses import DecoderLossConfig, segment_losses, weighted_mean

CASES = {
    "rudolph_350m_like": "rudolph",
    "rudolph_plain_norms": "rudolph",
    "rudolph_v1_no_specials": "rudolph",
    "rudalle_v2": "rudalle",
    "rudalle_v3": "rudalle",
    "sber_vqgan": "vqgan",
    "sber_vqgan_dwt": "vqgan",
    "ruclip": "ruclip",
    "realesrgan_x2": "realesrgan",
    "realesrgan_x4": "realesrgan",
    "realesrgan_x8": "realesrgan",
}
RUDOLPH_CASES = [case for case, family in CASES.items() if family == "rudolph"]


def reference(parity, case: str) -> Any:
    golden = parity(case)
    return from_reference(CASES[case], golden.config, golden.weights).eval()


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_rudalle_equals_the_reference(parity, version: str) -> None:
    golden, model = parity(f"rudalle_{version}"), reference(parity, f"rudalle_{version}")
    tokens = golden.io["tokens"]
    assert_near(model(tokens), golden.io["logits"])
    assert_near(model(tokens[:, :6]), golden.io["logits_text"])
    config = DecoderLossConfig(1, 7, 0, first_image_token="legacy")
    losses = segment_losses(model, tokens, config)
    assert_near(losses["left_text"], golden.io["loss_part_text"])
    assert_near(losses["image"], golden.io["loss_part_image"])
    assert_near(weighted_mean(losses, config.weights), golden.io["loss"])


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_rudalle_masks_equal_the_reference_in_every_layer(parity, version: str) -> None:
    golden, model = parity(f"rudalle_{version}"), reference(parity, f"rudalle_{version}")
    last = model.config.num_layers - 1
    for layer, table in enumerate(model.layer_tables):
        kind = "col" if (layer - 1) % 4 == 0 else "conv" if layer == last else "row"
        assert torch.equal(table, golden.io[f"mask_{kind}_mask"]), layer
        assert torch.equal(to_reference(model).state_dict[f"transformer.{kind}_mask"], table)


@pytest.mark.parametrize("case", ["sber_vqgan", "sber_vqgan_dwt"])
def test_sber_vqgan_equals_the_reference(parity, case: str) -> None:
    golden, model = parity(case), reference(parity, case)
    indices = model.encode_indices(golden.io["images"])
    assert torch.equal(indices, golden.io["indices"])
    assert_near(model.decode_indices(indices), golden.io["decoded"])
    tall = model.decode_indices(indices[:, :8], height=4)
    assert tall.shape[-2:] == (golden.io["decoded"].shape[-2], golden.io["decoded"].shape[-1] // 2)


def test_codes_are_drawn_by_their_weights_when_a_generator_is_given(parity) -> None:
    golden, model = parity("sber_vqgan"), reference(parity, "sber_vqgan")
    images = golden.io["images"][:1].expand(600, -1, -1, -1)
    drawn = model.encode_indices(images, generator=torch.Generator().manual_seed(0))
    shares = golden.io["quant_logits"][0].softmax(0).flatten(1).t()  # (I, K)
    counts = nn.functional.one_hot(drawn, shares.shape[1]).float().mean(0)
    # Five standard errors of a fraction of 600 samples.
    assert ((counts - shares).abs() < 5 * (shares * (1 - shares) / 600).sqrt() + 2e-3).all()


def test_the_inverse_wavelet_is_the_product_of_its_filters() -> None:
    low, high = haar_filters()
    bands = torch.randn(2, 12, 3, 5)
    images = inverse_haar(bands)
    pairs = [(low, low), (high, low), (low, high), (high, high)]  # down the rows, along them
    for colour in range(3):
        channels = [colour, *(3 + 3 * colour + band for band in range(3))]
        expected = sum(
            torch.kron(bands[:, channel], torch.outer(down, along))
            for channel, (down, along) in zip(channels, pairs, strict=True)
        )
        torch.testing.assert_close(images[:, colour], expected)


def test_ruclip_equals_the_reference(parity) -> None:
    golden, model = parity("ruclip"), reference(parity, "ruclip")
    ids, pixels = golden.io["input_ids"], golden.io["pixel_values"]
    per_image, per_text = model(ids, pixels)
    assert_near(per_image, golden.io["logits_per_image"])
    assert torch.equal(per_text, per_image.t())
    assert_near(model.encode_text(ids), golden.io["text_features"])
    assert_near(model.encode_image(pixels), golden.io["image_features"])


def test_ruclip_reads_a_text_at_its_first_end(parity) -> None:
    golden, model = parity("ruclip"), reference(parity, "ruclip")
    ids = golden.io["input_ids"].clone()
    end = (ids == 3).int().argmax(1)
    if int(end.min()) + 1 < ids.shape[1]:
        ids[:, -1] = 3  # the reference treats a second end as another text
    assert_near(model.encode_text(ids), golden.io["text_features"])


@pytest.mark.parametrize("broken", ["end", "length", "pixels"])
def test_ruclip_refuses_what_it_cannot_read(parity, broken: str) -> None:
    golden, model = parity("ruclip"), reference(parity, "ruclip")
    ids, pixels = golden.io["input_ids"], golden.io["pixel_values"]
    words = {"end": "EOS", "length": "at most 12 tokens, got 13", "pixels": "images must be"}
    if broken == "end":
        ids = ids.masked_fill(ids == 3, 5)
    elif broken == "length":
        ids = torch.cat([ids, ids[:, :1]], dim=1)
    else:
        pixels = pixels[..., :-1]
    with pytest.raises(ValueError, match=words[broken]):
        model(ids, pixels)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_realesrgan_equals_the_reference(parity, scale: int) -> None:
    golden, model = parity(f"realesrgan_x{scale}"), reference(parity, f"realesrgan_x{scale}")
    assert_near(model(golden.io["images"]), golden.io["upscaled"])


@pytest.mark.parametrize("case", CASES)
def test_to_reference_gives_the_same_file_again(parity, case: str) -> None:
    golden = parity(case)
    family, config, tensors = to_reference(reference(parity, case))
    assert family == CASES[case]
    assert tensors.keys() == golden.weights.keys()
    for key, value in golden.weights.items():
        assert torch.equal(tensors[key], value), key
    unsaid = {"eos_id"}
    assert {key: value for key, value in config.items() if key not in unsaid} == golden.config
    again = from_reference(family, config, tensors)
    assert all(
        torch.equal(value, tensor)
        for value, tensor in zip(
            again.state_dict().values(),
            reference(parity, case).state_dict().values(),
            strict=True,
        )
    )


@pytest.mark.parametrize("wrapping", ["params", "params_ema", "state_dict", "model.", "half"])
def test_wrappings_prefixes_and_dtypes_of_released_files_load(parity, wrapping: str) -> None:
    case = "rudolph_350m_like" if wrapping in ("model.", "half") else "realesrgan_x4"
    golden = parity(case)
    given: Any = golden.weights
    if wrapping == "model.":
        given = {"state_dict": {f"model.{key}": value for key, value in given.items()}}
    elif wrapping == "half":
        given = {key: value.half() for key, value in given.items()}
    else:
        given = {wrapping: given, "epoch": 3}
    model = from_reference(CASES[case], golden.config, given)
    expected = reference(parity, case).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key
    assert all(value.dtype == torch.half for value in model.parameters()) == (wrapping == "half")


def masked_by(parity, case: str, table: Tensor) -> dict[str, Tensor]:
    """Return a case's weights, with half-precision masks limited to ``table``."""
    weights = dict(parity(case).weights)
    for key in weights:
        if key.endswith("_mask"):
            weights[key] = (weights[key].bool() & table).half()  # early files store half masks
    return weights


@pytest.mark.parametrize("case", RUDOLPH_CASES)
def test_stored_masks_that_hide_left_text_win_over_the_rules(parity, case: str) -> None:
    golden = parity(case)
    hidden = mask_table(right_without_left(parse_mask("causal")), SequenceLayout(6, 4, 5))
    weights = masked_by(parity, case, hidden)
    with pytest.warns(StoredMaskWarning, match="right text does not attend to left text"):
        model = from_reference("rudolph", golden.config, weights).eval()
    assert not model.config.right_attends_left
    assert_near(model(golden.io["tokens"]), golden.io["logits_right_without_left"])
    stored = to_reference(model).state_dict
    for key, value in weights.items():
        assert torch.equal(stored[key], value.to(stored[key].dtype)), key


def test_any_other_stored_mask_is_used_as_it_is_and_said(parity) -> None:
    golden = parity("rudolph_350m_like")
    diagonal = torch.eye(27).bool()
    weights = dict(golden.weights) | {"transformer.conv_mask": diagonal}
    with pytest.warns(StoredMaskWarning, match=r"\(conv_mask\), which are not those"):
        model = from_reference("rudolph", golden.config, weights).eval()
    assert torch.equal(model.layer_tables[3], diagonal)
    assert torch.equal(to_reference(model).state_dict["transformer.conv_mask"], diagonal)
    first = model(golden.io["tokens"])[:, :1]
    assert_near(first, golden.io["logits"][:, :1])


@pytest.mark.parametrize("broken", ["missing", "extra", "shape", "config", "family", "kind"])
def test_a_checkpoint_that_does_not_fit_is_named_in_one_line(parity, broken: str) -> None:
    golden = parity("rudolph_350m_like")
    config, weights = dict(golden.config), dict(golden.weights)
    family, key = "rudolph", "transformer.layers.3.attention.query_key_value.weight"
    words = key
    if broken == "missing":
        del weights[key]
    elif broken == "extra":
        words = "transformer.layers.99.mlp.dense_h_to_4h.bias"
        weights[words] = torch.zeros(3)
    elif broken == "shape":
        weights[key] = weights[key][:-1]
    elif broken == "config":
        del config["hidden_size"]
        words = "the config lacks hidden_size"
    elif broken == "kind":
        weights[key] = [1, 2]
    else:
        family, words = "rudolf", "must be one of rudolph"
    with pytest.raises(ValueError, match=words) as caught:
        from_reference(family, config, weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", sorted(set(CASES.values())))
def test_a_file_of_another_family_is_refused_by_a_tensors_name(parity, family: str) -> None:
    for case, own in CASES.items():
        if own == family:
            continue
        config = next(parity(name).config for name, of in CASES.items() if of == family)
        with pytest.raises(ValueError, match=rf"{family}: the \w+ (has|lacks)") as caught:
            from_reference(family, config, parity(case).weights)
        assert "\n" not in str(caught.value)


COUNTS = st.integers(1, 3)


@st.composite
def decoder_configs(draw: Any) -> tuple[str, dict[str, Any]]:
    """Generate a family and the constructor arguments of a small decoder."""
    heads, left, side = draw(COUNTS), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    config = {
        "num_layers": draw(st.integers(1, 11)),
        "hidden_size": 4 * heads,
        "num_attention_heads": heads,
        "image_tokens_per_dim": side,
        "vocab_size": 9 + left,
        "image_vocab_size": draw(st.integers(2, 9)),
        "cogview_sandwich_layernorm": draw(st.booleans()),
        "cogview_pb_relax": draw(st.booleans()),
    }
    if draw(st.booleans()):
        version = draw(st.sampled_from(["v2", "v3"]))
        return "rudalle", config | {"text_seq_length": left, "hf_version": version}
    texts = {"l_text_seq_length": left, "r_text_seq_length": draw(st.integers(1, 6))}
    kernels = {"kernel_size": 2 * draw(COUNTS) + 1, "last_kernel_size": 2 * draw(COUNTS) + 1}
    specials = {"text_special_tokens": draw(COUNTS), "image_special_tokens": draw(COUNTS)}
    return "rudolph", config | texts | kernels | specials


def visible(kind: str, config: dict[str, Any], query: int, key: int) -> bool:
    """Return the reference's closed form of a mask in ``image_attention.py``, for one pair."""
    left = config.get("l_text_seq_length", config.get("text_seq_length"))
    side = config["image_tokens_per_dim"]
    a, b = query - left, key - left
    if key > query:
        return False
    if not (0 <= a < side**2 and 0 <= b < side**2):
        return True
    if kind == "row_mask":
        return a - b <= side
    if kind == "col_mask":
        return (a - b) % side == 0
    name = "kernel_size" if kind == "conv_mask" else "last_kernel_size"
    radius = config.get(name, 11) // 2
    rows, columns = abs(a // side - b // side), abs(a % side - b % side)
    if config.get("hf_version") == "v2":
        rows, columns = min(rows, side - rows), min(columns, side - columns)
    return rows <= radius and columns <= radius


@given(decoder_configs(), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_any_decoder_has_the_references_keys_counts_and_masks(
    drawn: tuple[str, dict[str, Any]], seed: int
) -> None:
    family, config = drawn
    torch.manual_seed(seed)
    empty = empty_model(family, config)
    tensors = {key: torch.randn(value.shape) for key, value in empty.state_dict().items()}
    model = empty.to_empty(device="cpu")
    model.load_state_dict(tensors)
    model.register_masks()
    _, found, stored = to_reference(model)
    assert {key: found[key] for key in config} == config
    layers, hidden = config["num_layers"], config["hidden_size"]
    norms = 4 if config["cogview_sandwich_layernorm"] else 2
    assert len(stored) == layers * (8 + 2 * norms) + (16 if family == "rudolph" else 14)
    counted = sum(value.numel() for key, value in stored.items() if not key.endswith("_mask"))
    assert counted == parameter_formula(family, config, layers, hidden, norms)
    for key, table in stored.items():
        if key.endswith("_mask"):
            kind = key.rpartition(".")[2]
            size = range(len(table))
            expected = [[visible(kind, config, query, at) for at in size] for query in size]
            assert table.tolist() == expected, key
    again = from_reference(family, found, stored)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in tensors.items())


def parameter_formula(
    family: str, config: dict[str, Any], layers: int, hidden: int, norms: int
) -> int:
    """Return the number of parameters that follows from the reference's constructor."""
    texts = config["vocab_size"] + config.get("text_special_tokens", 0)
    total = texts + config["image_vocab_size"] + config.get("image_special_tokens", 0)
    if family == "rudolph":
        positions = config["l_text_seq_length"] + 1 + config["r_text_seq_length"] + 1
    else:
        positions = config["text_seq_length"] + 1
    positions += 2 * config["image_tokens_per_dim"]
    block = layers * (12 * hidden**2 + 9 * hidden + 2 * norms * hidden)
    return block + 4 * hidden + 2 * total * hidden + total + positions * hidden


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (VQGAN(VQGANConfig(8, (32,), 1, (), 4, quantizer=QuantizerConfig("vq", 5, 4))), "a vq"),
        (
            VQGAN(
                VQGANConfig(
                    8, (8,), 1, (), 4, norm_groups=4, quantizer=QuantizerConfig("gumbel", 5, 4)
                )
            ),
            "4 groups",
        ),
        (
            MaskedDecoder(
                DecoderConfig(4, 8, 2, layer_masks=("row", "column", "causal", "conv(3)")),
                SequenceLayout(3, 2, 2),
                Vocabulary(9, 1, 3, 5, 0),
            ),
            "row_mask",
        ),
        (nn.Linear(2, 2), "no reference package has a model like Linear"),
    ],
)
def test_what_the_reference_cannot_express_is_named(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_reference(model)


def test_a_checkpoint_that_holds_itself_is_told_and_not_followed_for_ever(parity) -> None:
    golden = parity("realesrgan_x2")
    endless: dict[str, Any] = {}
    endless["state_dict"] = endless
    with pytest.raises(ValueError, match="the file lacks"):
        from_reference("realesrgan", golden.config, endless)
