"""Packed weights: nearly the plain product, the same model, and the same samples."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import generate_image, generate_text
from rudolph.models.cpu import prepacked_linear as packed
from rudolph.models.cpu.int8 import use_int8
from rudolph.models.cpu.prepacked_linear import (
    FEW_ROWS,
    LAYOUTS,
    PackedLinear,
    choose_layout,
    layout_works,
    prepack,
    prepack_in_own_dtype,
)
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.sequence.layout import SequenceLayout, Vocabulary

LAYOUT, VOCABULARY = SequenceLayout(5, 4, 6), Vocabulary(20, 3, 5, 11, 2)
GREEDY = TokenSamplingConfig(top_k=1)
needs = {
    name: pytest.mark.skipif(not layout_works(name), reason=f"no {name} here") for name in LAYOUTS
}
EVERY = [pytest.param(name, marks=needs[name]) for name in LAYOUTS]
# A plain layout multiplies single rows; several rows occur only with given tokens.
SEVERAL = [pytest.param(name, marks=needs[name]) for name in LAYOUTS if "plain" not in name]


def decoder() -> MaskedDecoder:
    # This seed has the widest gap between the two largest logits at every token among 60 seeds.
    torch.manual_seed(59)
    model = MaskedDecoder(DecoderConfig(3, 48, 3), LAYOUT, VOCABULARY).eval()
    with torch.no_grad():
        # Large logits make the model confident, so that rounding does not change a sample.
        model.to_logits.weight.mul_(20)
    return model


def prompts(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, 20, (batch, 5), generator=generator)


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("shape", [(1, 67), (7, 67), (2, 3, 67), (1, 1, 67)], ids=str)
def test_a_packed_layer_is_nearly_the_layer(layout: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(33, 67), torch.randn(33), torch.randn(shape)
    found, expected = PackedLinear(weight, bias, layout)(x), F.linear(x, weight, bias)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).norm() <= LAYOUTS[layout].tolerance * expected.norm()


@pytest.mark.parametrize("layout", SEVERAL)
def test_a_row_does_not_depend_on_its_neighbours(layout: str) -> None:
    torch.manual_seed(0)
    layer = PackedLinear(torch.randn(16, 64), torch.randn(16), layout)
    x = torch.randn(3, 64) * torch.tensor([[1.0], [100.0], [0.01]])
    alone = torch.cat([layer(row) for row in x.split(1)])
    torch.testing.assert_close(layer(x), alone, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("weights", packed.WEIGHT_FORMATS)
@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_packed_decoder_says_nearly_what_the_decoder_says(
    weights: str, rows: int, dtype: torch.dtype
) -> None:
    model, left = decoder(), prompts(rows)
    tokens = torch.cat([left, torch.zeros(rows, 16, dtype=torch.long)], dim=1)
    with torch.no_grad():
        expected = model(tokens)
        prepack(model.to(dtype), weights=weights, num_rows=rows)
        found = model(tokens)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 6e-2 * expected.norm()


@pytest.mark.parametrize("weights", packed.WEIGHT_FORMATS)
def test_a_packed_decoder_draws_what_the_decoder_draws(weights: str) -> None:
    model, left = decoder(), prompts(2)
    drawn = generate_image(model, left, config=GREEDY, seeds=[0, 1])
    right = torch.cat([left, drawn, torch.full((2, 1), 4)], dim=1)
    answers = generate_text(model, right, config=GREEDY, seeds=[0, 1])
    prepack(model, weights=weights, num_rows=2)
    assert torch.equal(generate_image(model, left, config=GREEDY, seeds=[0, 1]), drawn)
    assert torch.equal(generate_text(model, right, config=GREEDY, seeds=[0, 1]), answers)


def test_the_largest_activations_and_weights_do_not_saturate() -> None:
    """Without VNNI, fbgemm adds two products in 16 bits, and the largest ones must fit."""
    if not layout_works("int8"):
        pytest.skip("no int8 here")
    weight, bias = torch.full((8, 64), 3.0), torch.zeros(8)
    for x in (torch.full((1, 64), 5.0), torch.full((3, 64), 5.0)):
        expected = F.linear(x, weight, bias)
        torch.testing.assert_close(
            PackedLinear(weight, bias, "int8")(x), expected, rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("num_rows", [2, 259])
def test_many_rows_are_rounded_as_one_is(num_rows: int) -> None:
    if not layout_works("int8"):
        pytest.skip("no int8 here")
    torch.manual_seed(0)
    layer = PackedLinear(torch.randn(16, 64), torch.randn(16), "int8")
    x = torch.randn(num_rows, 64) * torch.logspace(-3, 2, num_rows)[:, None]
    x[0], x[1] = x[0].abs(), 0.0
    found, expected = layer(x), torch.cat([layer(row) for row in x.split(1)])
    # A number half-way between two levels may be rounded to either.
    is_same = torch.isclose(found, expected, rtol=1e-4, atol=1e-5).all(1)
    assert is_same.float().mean() > 0.98
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("weights", packed.WEIGHT_FORMATS)
@pytest.mark.parametrize("num_rows", [1, FEW_ROWS + 1])
def test_nothing_of_the_weights_that_were_read_stays_in_memory(
    weights: str, num_rows: int
) -> None:
    model = decoder()
    # As when a file is loaded: all tensors are views of one block of memory.
    parts = list(model.parameters())
    sizes = [part.numel() for part in parts]
    whole = np.concatenate([part.detach().numpy().ravel() for part in parts])
    is_held = weakref.ref(whole)
    for part, piece in zip(parts, torch.from_numpy(whole).split(sizes), strict=True):
        part.data = piece.view_as(part)
    del whole, part, piece, parts
    assert is_held() is not None
    prepack(model, weights=weights, num_rows=num_rows)
    gc.collect()
    assert is_held() is None


@pytest.mark.parametrize("held", ["float32", "float16", "bfloat16", "int8"])
def test_weights_are_packed_when_they_are_held_in_fewer_bits(held: str) -> None:
    model = decoder()
    with torch.no_grad():
        expected = model(prompts(2))
    if held == "int8":
        weights = model.layers.state_dict()
        use_int8(model.layers)
        model.layers.load_state_dict(weights)
    else:
        model.to(getattr(torch, held))
    prepack_in_own_dtype(model, num_rows=2)
    packed_parts = [part for part in model.modules() if isinstance(part, PackedLinear)]
    layouts = {part.layout for part in packed_parts}
    assert layouts == {LAYOUTS[{"float32": "float32", "int8": "int8"}.get(held, "float16")]}
    with torch.no_grad():
        difference = (model(prompts(2)) - expected).norm()
    assert difference <= (1e-5 if held == "float32" else 6e-2) * expected.norm()


def test_the_layout_follows_the_number_of_rows_and_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "layout_works", lambda layout: True)
    monkeypatch.setattr(packed, "has_native_bfloat16", lambda: False)
    for num_rows in (1, FEW_ROWS + 1):
        assert choose_layout("half", num_rows) == "float16"
    monkeypatch.setattr(packed, "has_native_bfloat16", lambda: True)
    assert choose_layout("half", FEW_ROWS) == "float16"
    assert choose_layout("half", FEW_ROWS + 1) == "bfloat16"
    assert choose_layout("int8", 1) == "int8"
    # The compiler vectorises loops over int8 only with AVX512.
    for has_avx512, layout in ((True, "plain int8"), (False, "int8")):
        monkeypatch.setattr(packed, "has_avx512", lambda has_avx512=has_avx512: has_avx512)
        assert choose_layout("int8", 1, is_compiled=True) == layout
        assert choose_layout("half", 1, is_compiled=True) == "plain half"
        assert choose_layout("int8", 2, is_compiled=True) == "int8"
    monkeypatch.setattr(packed, "layout_works", lambda layout: layout == "bfloat16")
    assert choose_layout("int8", 1) == choose_layout("half", 1) == "bfloat16"
    monkeypatch.setattr(packed, "layout_works", lambda layout: False)
    model = decoder()
    before = model(prompts(1))
    prepack(model, weights="int8", num_rows=1)
    assert torch.equal(model(prompts(1)), before)
    with pytest.raises(ValueError, match="weights must be one of float32, half, int8, got 'int4'"):
        choose_layout("int4", 1)


def test_a_kernel_that_is_missing_or_wrong_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError

    kernels = LAYOUTS["bfloat16"]
    for broken in (
        kernels._replace(pack=missing),
        kernels._replace(multiply=lambda p, x: x.new_zeros(3, 48)),
    ):
        layout_works.cache_clear()
        monkeypatch.setitem(LAYOUTS, "bfloat16", broken)
        assert not layout_works("bfloat16")
    layout_works.cache_clear()
