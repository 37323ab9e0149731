"""LLaVA: equal to Hugging Face's, its token counts known before, rows independent of a batch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.models.fusion.connectors import CONNECTORS, ConnectorConfig
from rudolph.models.llava.anyres import (
    HUGGING_FACE_CANVASES,
    LLAVA_CANVASES,
    num_anyres_tokens,
    pack_tiles,
    select_canvas,
    unpadded,
)
from rudolph.models.llava.llava import (
    LLAVA_CONFIGS,
    ImageTokenConfig,
    LLaVA,
    LLaVAConfig,
    build_llava,
)
from rudolph.models.llava.preprocess import (
    ASPECTS,
    anyres_crops,
    normalised,
    prepare_images,
    resized,
)
from rudolph.models.lm.language_model import LanguageModelConfig
from rudolph.models.reference import from_reference, to_reference
from rudolph.models.vision.clip import MEAN, VisionConfig
from rudolph.models.vision.conv import ConvEncoderConfig
from rudolph.models.vision.encoders import VisionEncodersConfig
from rudolph.models.vision.features import FeatureConfig

CASES = {"llava": "llava", "llava_full_features": "llava", "llava_next": "llava_next"}
IMAGE = 19
TEXT = LanguageModelConfig(20, 8, 2, 2, 1, 4, 12)
VISION = VisionConfig(8, 4, 6, 2, 2, 10)  # 2 x 2 patches
CANVASES = ((8, 16), (16, 8), (16, 16), (24, 8), (8, 24))
CONV = ConvEncoderConfig(8, (5,), (1,), stem_size=4, kernel_size=3)


def reference(parity, case: str) -> Any:
    golden = parity(case)
    return from_reference(CASES[case], golden.config, golden.weights).eval()


def small(canvases: tuple[tuple[int, int], ...] = (), select: str = "patch") -> LLaVA:
    torch.manual_seed(0)
    vision = VisionEncodersConfig((VISION,), FeatureConfig(select=select))
    config = LLaVAConfig(vision, ConnectorConfig(), TEXT, IMAGE, canvases)
    model = build_llava(config).eval()
    for value in model.parameters():
        nn.init.normal_(value, std=0.3)
    return model


ANYRES = small(CANVASES)


def inputs_of(io: dict[str, Tensor]) -> tuple[Any, ...]:
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes_hw")
    return tuple(io.get(name) for name in names)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_equals_hugging_face(parity, case: str) -> None:
    golden, model = parity(case), reference(parity, case)
    ids, mask, pixels, sizes = inputs_of(golden.io)
    vectors = model.image_vectors(pixels, sizes)
    assert_near(torch.cat(vectors), golden.io["image_features"].flatten(0, -2))
    assert_near(model(ids, mask, pixels, sizes)[mask.bool()], golden.io["logits"][mask.bool()])


def test_canvases_and_token_counts_equal_hugging_face(parity) -> None:
    golden, model = parity("llava_next"), reference(parity, "llava_next")
    sizes = [tuple(size) for size in golden.io["image_sizes_hw"].tolist()]
    canvases = [select_canvas(size, model.images.canvases) for size in sizes]
    assert canvases == [tuple(row) for row in golden.io["best_resolution_hw"].tolist()]
    tiles = [model.tiles_of(size) for size in sizes]
    assert tiles == [tuple(row) for row in golden.io["grid_shape"].tolist()]
    counts = [model.num_image_tokens(size) for size in sizes]
    assert counts == golden.io["num_image_tokens"].tolist()


@pytest.mark.parametrize("case", ["llava", "llava_full_features"])
@torch.no_grad()
def test_cached_greedy_decoding_is_uncached_and_hugging_faces(parity, case: str) -> None:
    golden, model = parity(case), reference(parity, case)
    length = int(golden.io["attention_mask"][0].sum())
    ids, pixels = golden.io["input_ids"][:1, :length], golden.io["pixel_values"][:1]
    cached = model.generate_greedily(ids, None, pixels, num_tokens=6)
    assert torch.equal(cached[0], golden.io["greedy"])
    for token in golden.io["greedy"]:
        assert model(ids, None, pixels)[0, -1].argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


@pytest.mark.parametrize("case", CASES)
def test_to_reference_gives_the_same_file_again(parity, case: str) -> None:
    golden, model = parity(case), reference(parity, case)
    family, config, tensors = to_reference(model)
    assert family == CASES[case]
    assert tensors.keys() == golden.weights.keys()
    assert all(torch.equal(tensors[key], value) for key, value in golden.weights.items())
    for section in ("vision_config", "text_config"):
        theirs = golden.config[section]
        theirs |= {"rope_theta": theirs.get("rope_parameters", {}).get("rope_theta")}
        for name, value in config.pop(section).items():
            assert theirs[name] == value, name
    assert {name: golden.config[name] for name in config} == config


OLD_PREFIXES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.image_newline": "image_newline",
}
LLAVA_PREFIXES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}
MIDDLE_PREFIXES = {"model.vision_tower.": "model.vision_tower.vision_model."}


@pytest.mark.parametrize("prefixes", [OLD_PREFIXES, LLAVA_PREFIXES, MIDDLE_PREFIXES])
def test_older_names_and_llavas_own_load_the_same_model(parity, prefixes: dict) -> None:
    golden = parity("llava_next")
    weights: dict[str, Tensor] = {}
    for key, value in golden.weights.items():
        theirs = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        weights[prefixes.get(theirs, "") + key.removeprefix(theirs)] = value
    assert weights.keys() != golden.weights.keys()
    # Buffers of older files.
    weights["model.vision_tower.embeddings.position_ids"] = torch.arange(10)
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state = from_reference("llava_next", golden.config, weights).state_dict()
    expected = reference(parity, "llava_next").state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_a_tied_head_loads_with_and_without_its_copy(parity) -> None:
    golden = parity("llava")
    text = golden.config["text_config"] | {"tie_word_embeddings": True}
    config = golden.config | {"text_config": text}
    words = golden.weights["model.language_model.embed_tokens.weight"]
    alone = {key: value for key, value in golden.weights.items() if key != "lm_head.weight"}
    ids = golden.io["input_ids"][2:]
    without, with_copy = (
        from_reference("llava", config, weights)(ids)
        for weights in (alone, alone | {"lm_head.weight": words})
    )
    assert torch.equal(without, with_copy)
    with pytest.raises(ValueError, match=r"must equal .*embed_tokens.weight, to which it is tied"):
        from_reference("llava", config, golden.weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model.vision_tower.head.weight": torch.zeros(1)},
            "the file has model.vision_tower.head",
        ),
        ({"model.vision_tower.post_layernorm.bias": None}, "lacks model.vision_tower.post_layern"),
        (
            {"lm_head.weight": torch.zeros(3, 48)},
            r"lm_head.weight must be \(70, 48\), got \(3, 48",
        ),
        ({"model.image_newline": torch.zeros(48)}, "the file has model.image_newline"),
        (
            {"model.norm.weight": torch.zeros(48)},
            "both model.language_model.norm.weight and model",
        ),
        (
            {"model.vision_tower.encoder.layers.1.self_attn.k_proj.bias": None},
            "lacks model.vision_tower.encoder.layers.1.self_attn",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(parity, change: dict, words: str) -> None:
    golden = parity("llava")
    weights = golden.weights | change
    weights = {key: value for key, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match=words) as caught:
        from_reference("llava", golden.config, weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projector_hidden_act": "relu"}, "llava: projector_hidden_act: expected 'gelu'"),
        ({"vision_feature_select_strategy": "cls"}, "expected one of default, full, got 'cls'"),
        ({"vision_feature_layer": 9}, "layers: expected -4 to 3, got 9"),
        ({"vision_config": {}}, "the config lacks image_size"),
    ],
)
def test_arguments_that_do_not_fit_are_named(parity, change: dict, words: str) -> None:
    golden = parity("llava")
    with pytest.raises(ValueError, match=words):
        from_reference("llava", golden.config | change, golden.weights)


# (width, height) in pixels, canvas (width, height), unpadded rows and columns, tokens.
TABLE = [
    ((336, 336), (336, 672), (24, 24), 1176),
    ((640, 480), (672, 672), (36, 48), 2340),
    ((480, 640), (672, 672), (48, 36), 2352),
    ((1024, 1024), (672, 672), (48, 48), 2928),
    ((512, 512), (672, 672), (48, 48), 2928),
    ((1600, 400), (1008, 336), (18, 72), 1890),
    ((400, 1600), (336, 1008), (72, 18), 1944),
    ((1000, 500), (672, 336), (24, 48), 1752),
    ((672, 336), (672, 336), (24, 48), 1752),
    ((950, 1256), (672, 672), (48, 36), 2352),
    ((100, 80), (336, 672), (20, 24), 1076),
    ((200, 50), (336, 672), (6, 24), 726),
]


@pytest.mark.parametrize(("image", "canvas", "kept", "tokens"), TABLE)
def test_the_table_of_llava_next(image, canvas, kept, tokens: int) -> None:
    size = image[::-1]
    assert select_canvas(size, LLAVA_CANVASES) == canvas[::-1]
    rows, columns = unpadded(size, canvas[1] // 14, canvas[0] // 14)
    assert (rows.stop - rows.start, columns.stop - columns.start) == kept
    found = num_anyres_tokens(size, LLAVA_CANVASES, tile=336, grid=(24, 24))
    assert found == tokens == 576 + kept[0] * kept[1] + kept[0]


def test_hugging_face_breaks_ties_for_the_wide_canvas() -> None:
    for size in ((336, 336), (80, 100), (50, 200)):
        assert select_canvas(size, LLAVA_CANVASES) == (672, 336)
        assert select_canvas(size, HUGGING_FACE_CANVASES) == (336, 672)
    assert sorted(LLAVA_CANVASES) == sorted(HUGGING_FACE_CANVASES)


def test_of_canvases_that_keep_all_pixels_the_smallest_wins() -> None:
    for canvases in (((16, 16), (8, 16)), ((8, 16), (16, 16))):
        assert select_canvas((8, 8), canvases) == (8, 16)


@given(st.tuples(st.integers(5, 60), st.integers(5, 60)))
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_the_processor_and_the_model_agree_on_every_size(size: tuple[int, int]) -> None:
    model = ANYRES
    pixels, sizes = prepare_images([torch.rand(3, *size)], model.images)
    try:
        count = model.num_image_tokens(size)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            model.image_vectors(pixels, sizes)
        return
    ids = torch.tensor([[3, *[IMAGE] * count, 3]])
    assert model(ids, None, pixels, sizes).isfinite().all()


@given(st.integers(20, 3000), st.integers(20, 3000))
@settings(max_examples=200, deadline=None)
def test_what_is_kept_of_the_map_is_where_the_image_was_pasted(height: int, width: int) -> None:
    """The border of the map against that of the canvas, to one token of 14 pixels."""
    canvas = select_canvas((height, width), LLAVA_CANVASES)
    scale = min(canvas[0] / height, canvas[1] / width)
    if min(height, width) * scale < 28:
        return
    kept = unpadded((height, width), canvas[0] // 14, canvas[1] // 14)
    for part, extent, pixels in zip(kept, (height, width), canvas, strict=True):
        border = (pixels - extent * scale) / 2
        assert abs(part.start * 14 - border) <= 14
        assert part.stop + part.start == pixels // 14


def test_tiles_are_packed_as_a_loop_over_cells_packs_them() -> None:
    (tile_rows, tile_columns), (h, w) = (2, 3), (2, 2)
    crops = torch.randn(1 + tile_rows * tile_columns, h * w, 5)
    newline, size = (
        torch.randn(5),
        (30, 90),
    )  # a third as high as wide: one row is cut above, below
    expected = list(crops[0])
    rows, columns = unpadded(size, tile_rows * h, tile_columns * w)
    assert (rows, columns) == (slice(1, 3), slice(0, 6))
    for row in range(rows.start, rows.stop):
        for column in range(columns.start, columns.stop):
            tile = 1 + (row // h) * tile_columns + column // w
            expected.append(crops[tile, (row % h) * w + column % w])
        expected.append(newline)
    found = pack_tiles(crops, size, (2, 3), grid=(h, w), newline=newline)
    assert torch.equal(found, torch.stack(expected))


VIT, MLP_7B, MLP_13B = 303_507_456, 20_979_712, 31_467_520
LM_7B, LM_13B, LM_34B = 6_738_415_616, 13_015_864_320, 34_388_917_248
MLP_34B = 1024 * 7168 + 7168 * 7168 + 2 * 7168
COUNTS = {
    "llava-1.5-7b": VIT + MLP_7B + LM_7B,
    "llava-1.5-13b": VIT + MLP_13B + LM_13B,
    "llava-next-7b": VIT + MLP_7B + LM_7B + 4096,
    "llava-next-13b": VIT + MLP_13B + LM_13B + 5120,
    "llava-next-34b": VIT + MLP_34B + LM_34B + 7168,
}


@pytest.mark.parametrize("name", LLAVA_CONFIGS)
def test_named_sizes_have_their_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build_llava(LLAVA_CONFIGS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
    assert model.num_image_tokens((1024, 1024)) == (2928 if "next" in name else 576)


def batch_of(model: LLaVA) -> tuple[list[list[int]], Tensor, Tensor, Tensor]:
    """Rows with two images, none and one; the images of all rows, their rows and sizes."""
    torch.manual_seed(2)
    sizes = [(8, 8), (9, 21), (30, 12)]
    images = [torch.rand(3, *size) for size in sizes]
    marks = [[IMAGE] * model.num_image_tokens(size) for size in sizes]
    rows = [[1, *marks[0], 5, *marks[1], 6], [1, 4, 7], [*marks[2], 9, 2, 3]]
    pixels, image_sizes = prepare_images(images, model.images)
    return rows, pixels, image_sizes, torch.tensor([0, 0, 2])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("canvases", [(), CANVASES], ids=["one view", "anyres"])
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(canvases: Any, side: str) -> None:
    model = small(canvases)
    rows, pixels, sizes, row_of = batch_of(model)
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    ids, mask = (
        torch.stack(
            [
                F.pad(torch.tensor(row), (pad, 0) if side == "left" else (0, pad), value=0)
                for row, pad in zip(values, pads, strict=True)
            ]
        )
        for values in (rows, [[1] * len(row) for row in rows])
    )
    together = model(ids, mask, pixels, sizes)
    new = model.generate_greedily(ids, mask, pixels, sizes, num_tokens=3)
    for index, row in enumerate(rows):
        own = row_of == index
        images = (pixels[own], sizes[own]) if own.any() else (None, None)
        alone = model(torch.tensor([row]), None, *images)[0]
        assert_near(together[index][mask[index].bool()], alone)
        own_new = model.generate_greedily(torch.tensor([row]), None, *images, num_tokens=3)
        assert torch.equal(own_new[0], new[index])


@torch.no_grad()
def test_an_image_changes_nothing_before_it_and_no_other_row() -> None:
    model = small()
    rows, pixels, _, _ = batch_of(model)
    ids = torch.tensor([rows[0], rows[1] + [0] * (len(rows[0]) - 3)])
    before = model(ids, None, pixels[:2])
    changed = pixels[:2].clone()
    changed[1] += 1
    after = model(ids, None, changed)
    start = 2 + model.num_view_tokens
    assert torch.equal(before[0, :start], after[0, :start])
    assert not torch.allclose(before[0, -1], after[0, -1])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("canvases", [(), CANVASES], ids=["one view", "anyres"])
# A table reads codes instead of features, and a blank nothing.
@pytest.mark.parametrize("connector", sorted(CONNECTORS.keys() - {"table", "blank"}))
@pytest.mark.parametrize("encoders", [(CONV,), (CONV, VISION)], ids=["conv", "conv and vit"])
def test_any_encoder_and_connector_train_together(
    encoders: Any, connector: str, canvases: Any
) -> None:
    torch.manual_seed(0)
    config = LLaVAConfig(
        VisionEncodersConfig(encoders),
        ConnectorConfig(connector, num_out=4, width=6, depth=1),
        TEXT,
        IMAGE,
        canvases,
    )
    if canvases and connector in ("tome", "resampler"):
        with pytest.raises(ValueError, match="expected a square grid of tokens for anyres"):
            build_llava(config)
        return
    model = build_llava(config)
    pixels, sizes = prepare_images([torch.rand(3, 12, 20)], model.images)
    ids = torch.tensor([[1, *[IMAGE] * model.num_image_tokens((12, 20)), 2, 3]])
    model(ids, None, pixels, sizes).log_softmax(-1)[0, -2, 3].backward()
    missed = {name for name, value in model.named_parameters() if value.grad is None}
    # Neither the last layer nor the output norm is read.
    unread = (
        "vision.encoders.1.encoder.ln_post",
        "vision.encoders.1.encoder.transformer.resblocks.1",
    )
    assert all(name.startswith(unread) for name in missed)
    assert bool(missed) == (len(encoders) == 2)


def test_a_newline_starts_as_large_as_a_unit_vector() -> None:
    torch.manual_seed(0)
    vision = VisionEncodersConfig((VISION,))
    text = LanguageModelConfig(20, 4096, 1, 1, 1, 2, 1)
    config = LLaVAConfig(vision, language_model=text, canvases=CANVASES)
    newline = build_llava(config).image_newline
    assert math.isclose(float(newline.detach().norm()), 1, rel_tol=0.05)
    assert build_llava(LLaVAConfig(vision, language_model=TEXT)).image_newline is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda model: model(torch.full((1, 9), IMAGE), None, torch.zeros(2, 3, 8, 8)),
            "expected 8 image tokens in row 0 for the vectors of 2 images, got 9",
        ),
        (
            lambda model: model(torch.full((1, 4), IMAGE)),
            "expected 0 image tokens in row 0 for the vectors of 0 images, got 4",
        ),
        (
            # Their sum is right, but the second image would lie across two rows.
            lambda model: model(
                torch.tensor([[IMAGE] * 6, [1, 2, 3, 4] + [IMAGE] * 2]),
                None,
                torch.zeros(2, 3, 8, 8),
            ),
            "expected 8 image tokens in row 0 for the vectors of 2 images, got 6",
        ),
        (
            lambda model: model(torch.full((1, 4), IMAGE), None, torch.zeros(2, 3, 8, 8)),
            "expected image tokens for 2 images, got those of 1",
        ),
        (
            lambda model: ANYRES.image_vectors(torch.zeros(1, 4, 3, 8, 8)),
            r"image_sizes: expected \(P, 2\) for anyres, got None",
        ),
        (
            lambda model: ANYRES.image_vectors(
                torch.zeros(1, 4, 3, 8, 8), torch.tensor([[16, 16]])
            ),
            "expected 5 crops for the size of image 0, got 4",
        ),
        (
            lambda model: ANYRES.image_vectors(torch.zeros(1, 3, 8, 8), torch.tensor([[16, 16]])),
            r"pixel_values: expected \(P, C, 3, S, S\) with 1 images, got \(1, 3, 8, 8\)",
        ),
        (
            lambda model: ANYRES.num_image_tokens((3, 400)),
            "got 3x400 pixels, which is too long",
        ),
        (lambda model: ImageTokenConfig(3, 8, ((8, 12),)), r"image_size \(8\), got 8x12"),
        (lambda model: ImageTokenConfig(3, 0), "image_size: expected at least 1, got 0"),
        (
            lambda model: small(CANVASES, "full"),
            r"expected a square grid of tokens for anyres, got 5 tokens in the grid \(1, 5\)",
        ),
        (
            lambda model: prepare_images([torch.zeros(3, 8, 8)], model.images, aspect="fit"),
            "aspect: expected one of pad, squeeze, crop, got 'fit'",
        ),
        (
            lambda model: prepare_images([torch.zeros(1, 8, 8)], model.images),
            r"expected \(3, H, W\) for image 0, got \(1, 8, 8\)",
        ),
        (lambda model: prepare_images([], model.images), "expected at least one image"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call(small())
    assert "\n" not in str(caught.value)


def test_tiles_make_up_the_canvas_and_the_whole_view_comes_first() -> None:
    torch.manual_seed(0)
    image, config = torch.rand(3, 12, 16), ImageTokenConfig(IMAGE, 8, CANVASES)
    crops = anyres_crops(image, config)  # canvas 16 x 16, the image fills 12 rows of it
    canvas = torch.cat([torch.cat(list(crops[row : row + 2]), dim=2) for row in (1, 3)], dim=1)
    assert torch.equal(canvas[:, 2:14], image)
    assert (canvas[:, :2] == 0).all() and (canvas[:, 14:] == 0).all()
    assert torch.equal(crops[0], resized(image, (8, 8)))
    pixels, sizes = prepare_images([image, torch.rand(3, 8, 16)], config)
    assert pixels.shape == (2, 5, 3, 8, 8)
    assert torch.equal(pixels[0], normalised(crops))
    assert sizes.tolist() == [[12, 16], [8, 16]]


def test_an_aspect_pads_squeezes_or_crops() -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 8, 12)
    assert torch.equal(ASPECTS["crop"](image, 8), image[..., 2:10])
    assert torch.equal(ASPECTS["squeeze"](image, 8), resized(image, (8, 8)))
    padded = ASPECTS["pad"](image, 12)
    assert torch.equal(padded[:, 2:10], image)
    border = torch.cat([padded[:, :2], padded[:, 10:]], dim=1)
    torch.testing.assert_close(border, torch.tensor(MEAN)[:, None, None].expand_as(border))
