"""Compiled decoding steps: the same shapes at every position, the same tokens as uncompiled."""

from collections.abc import Callable

import pytest
import torch

from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import generate_image, generate_text
from rudolph.models.cpu.prepacked_linear import WEIGHT_FORMATS, Kernel, PackedLinear, prepack
from rudolph.models.layers.attention import FullView
from rudolph.models.rudolph import compiled
from rudolph.models.rudolph import decoder as decoder_module
from rudolph.models.rudolph import decoder as layer_module
from rudolph.models.rudolph.compiled import check_compiler
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.rudolph.static_decode import NUM_KEYS_MULTIPLE, static_selection
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.masks import mask_table, parse_mask

LAYOUT, VOCABULARY = SequenceLayout(5, 7, 6), Vocabulary(20, 3, 5, 11, 2)
MASKS = ("causal", "row", "column", "conv(3)", "conv(5)")
CPU = torch.device("cpu")
GREEDY = TokenSamplingConfig(top_k=1)
GUIDED = TokenSamplingConfig(top_k=7, guidance=1.5)
PLAIN = TokenSamplingConfig(top_k=7)


def decoder(*masks: str, seed: int = 3, **changes: object) -> MaskedDecoder:
    torch.manual_seed(seed)
    config = DecoderConfig(len(masks), 24, 3, layer_masks=masks, last_layer_mask=None, **changes)
    return MaskedDecoder(config, LAYOUT, VOCABULARY).eval()


def prompts(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, 20, (batch, 5), generator=generator)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("first", [0, 5, 30])
def test_what_is_read_in_steady_shapes_is_what_the_mask_shows(mask: str, first: int) -> None:
    table = mask_table(parse_mask(mask), LAYOUT)
    rows = table[first:, first:]
    reads = static_selection(rows, CPU)
    assert reads is not None and reads.at is not None and reads.mask is not None
    assert reads.at.shape == reads.mask.shape and len(reads.at) == len(rows)
    most = int(rows.sum(1).max())
    assert most <= reads.at.shape[1] < most + NUM_KEYS_MULTIPLE
    for row, at, seen in zip(rows, reads.at, reads.mask, strict=True):
        assert sorted(at[seen].tolist()) == row.nonzero().flatten().tolist()
        # Keys that do not exist yet are not read.
        assert bool(row[at].all())


def test_what_no_position_or_every_position_sees_is_not_gathered() -> None:
    assert static_selection(torch.zeros(3, 4, dtype=torch.bool), CPU) is None
    assert static_selection(torch.ones(3, 4, dtype=torch.bool), CPU) == (None, None)
    reads = static_selection(torch.tensor([[False, False], [False, True]]), CPU)
    assert reads is not None and reads.at is not None
    assert reads.at.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("sees_left", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_steady_steps_are_the_plain_steps(
    samples: int, sees_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static steps without compilation give the same hidden states, at every position and mask."""
    monkeypatch.setattr(decoder_module, "compile_function", lambda function: function)
    plain, steady = (decoder(*MASKS, right_attends_left=sees_left) for _ in range(2))
    steady.has_compiled_layers = True
    generator = torch.Generator().manual_seed(7)
    rest = torch.randint(0, 11, (2 * samples, 55), generator=generator)
    expected, found = (hidden_of(model, prompts(2), rest) for model in (plain, steady))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("samples", [1, 6])
def test_compiled_steps_are_nearly_those_of_the_decoder(weights: str, samples: int) -> None:
    torch._dynamo.reset()
    exact, packed = decoder("conv(3)"), decoder("conv(3)")
    prepack(packed, weights=weights, num_rows=samples, is_compiled=True)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 11, (samples, 6), generator=generator)
    expected, found = (hidden_of(model, prompts(1), tokens) for model in (exact, packed))
    tolerance = {"float32": 1e-5, "half": 2e-2, "int8": 4e-2}[weights]
    assert (found - expected).norm() <= tolerance * expected.norm()


def hidden_of(model: MaskedDecoder, left: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the hidden states at the given tokens, decoded one after the other."""
    cache = model.new_cache(len(left), num_positions=left.shape[1])
    with torch.inference_mode():
        model.hidden(left, cache)
        cache = cache.expand_samples(len(tokens) // len(left), num_positions=tokens.shape[1])
        # Positions that do not exist yet must not be read.
        cache.own.fill_(torch.nan)
        return torch.cat([model.hidden(token, cache) for token in tokens.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("samples", [1, 3])
def test_compiled_and_plain_steps_draw_the_same_images_and_texts(
    weights: str, samples: int
) -> None:
    """Rounding changes no token, for guided images and for texts of different lengths."""
    torch._dynamo.reset()
    drawn, seeds = [], range(samples)
    # A product with a single row of 8 or 16 bits rounds its numbers differently.
    is_same = samples > 1 or weights == "float32"
    config = GUIDED if samples > 1 else PLAIN if is_same else GREEDY
    for is_compiled in (False, True):
        # Seed 277 has the widest gap between the two largest logits among 300 seeds.
        model = decoder("row", seed=277)
        with torch.no_grad():
            # Large logits make the model confident.
            model.to_logits.weight.mul_(20)
        prepack(model, weights=weights, num_rows=2 * samples - 1, is_compiled=is_compiled)
        image = generate_image(
            model, prompts(1), config=config, seeds=seeds, unconditional=torch.full((5,), 2)
        )
        start = torch.cat([prompts(1).expand(samples, -1), image, torch.full((samples, 1), 4)], 1)
        text = generate_text(model, start, config=PLAIN if is_same else GREEDY, seeds=seeds)
        drawn.append(torch.cat([image, text], dim=1))
    assert torch.equal(*drawn)


def test_all_layers_share_a_compilation_and_prompts_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[torch.Size] = []
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        graphs += 1

        def run(*given: torch.Tensor) -> object:
            shapes.append(given[0].shape)
            return graph.forward(*given)

        return run

    torch._dynamo.reset()

    def counted(function: Callable[..., object]) -> object:
        return torch.compile(function, backend=backend, dynamic=False)

    monkeypatch.setattr(decoder_module, "compile_function", counted)
    model = decoder("row", "column", "row", "row", leading_bos=True)
    prepack(model, weights="half", num_rows=8, is_compiled=True)
    generate_image(model, prompts(2), config=PLAIN, seeds=list(range(8)))
    assert graphs == 1
    assert len(shapes) == 4 * (LAYOUT.num_image_tokens - 1)


def test_a_layer_with_dropout_is_one_graph() -> None:
    torch._dynamo.reset()
    model = decoder("row").train()
    look = FullView(model.full_masks(9)[0], 2)
    explained = torch._dynamo.explain(layer_module.run_layer)(
        model.layers[0], torch.randn(2, 9, 24), look
    )
    assert explained.graph_count == 1 and explained.graph_break_count == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_compiled_training_has_the_gradients_of_the_plain_one(has_checkpointing: bool) -> None:
    torch._dynamo.reset()
    tokens = torch.cat([prompts(3), torch.ones(3, 20, dtype=torch.long)], dim=1)
    gradients = []
    for is_compiled in (False, True):
        model = decoder("row", "conv(3)", attention_dropout=0.0, output_dropout=0.0).train()
        model.has_compiled_layers, model.has_checkpointing = is_compiled, has_checkpointing
        model.hidden(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.layers.parameters()])
    for plain, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_a_kernel_is_forgotten_with_its_layer() -> None:
    layer = PackedLinear(torch.randn(8, 16), torch.randn(8), "float32")
    number = int(layer.packed.number)
    assert Kernel.known[number] is layer.packed
    del layer
    assert number not in Kernel.known


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(compiled, "compile_function", broken)
    check_compiler.cache_clear()
    message = (
        "compiling needs a C\\+\\+ compiler that torch finds: No working C\\+\\+ compiler found$"
    )
    with pytest.raises(ValueError, match=message):
        prepack(decoder("row"), weights="half", num_rows=1, is_compiled=True)
    check_compiler.cache_clear()
