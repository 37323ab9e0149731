"""Flamingo: the references' numbers, no leak of later images, padding, caches and what trains."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rudolph.models.flamingo.flamingo import (
    Flamingo,
    FlamingoCache,
    FlamingoConfig,
)
from rudolph.models.flamingo.sizes import FLAMINGO_SIZES
from rudolph.models.fusion.cross_attention import CrossAttentionConfig, MaskedCrossAttention
from rudolph.models.fusion.media_mask import MEDIA_RULES
from rudolph.models.fusion.resampler import ResamplerConfig
from rudolph.models.lm.language_model import LanguageModelConfig
from rudolph.models.reference import empty_model, from_reference, to_reference
from rudolph.models.vision.vit import LinearPatchEncoder, ViT, ViTConfig

CASES = ["flamingo_palm", "flamingo_vit", "flamingo_all_media", "flamingo_video"]
TAG = 3
TEXT = torch.tensor(
    [[5, 9, TAG, 7, 8, TAG, 4, 6], [TAG, 7, TAG, 5, 4, 4, 9, 8], [6, TAG, 5, 7, 7, 8, 9, 4]]
)
CONFIG = FlamingoConfig(
    language_model=LanguageModelConfig(
        vocab_size=20,
        hidden_size=12,
        num_layers=4,
        num_heads=4,
        num_key_value_heads=2,
        head_size=4,
        mlp_size=16,
    ),
    resampler=ResamplerConfig(width=10, num_layers=1, num_latents=3, num_heads=2, head_size=4),
    cross_attention=CrossAttentionConfig(num_heads=3, head_size=4),
    every=2,
)
both_rules = pytest.mark.parametrize("rule", MEDIA_RULES)
both_places = pytest.mark.parametrize("place", ["before", "after"])


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def reference(parity: Any, case: str) -> Any:
    golden = parity(case)
    return from_reference("flamingo", golden.config, golden.weights).eval()


def media_of(io: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: io[name] for name in ("images", "videos") if name in io}


def model_of(config: FlamingoConfig = CONFIG, *, gate: float = 0.8) -> Flamingo:
    torch.manual_seed(0)
    model = Flamingo(config, LinearPatchEncoder(config.resampler.width, 4))
    for name, value in model.named_parameters():
        nn.init.normal_(value, std=0.4)
        if name.endswith("_gate"):
            nn.init.constant_(value, gate)
    return model.eval()


def images_of(num_rows: int = 3, num_media: int = 2) -> Tensor:
    return torch.randn(num_rows, num_media, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_flamingo_equals_the_reference(parity, case: str) -> None:
    golden, model = parity(case), reference(parity, case)
    text = golden.io["text"]
    assert_near(model(text), golden.io["logits_text_only"])
    if "image_embeddings" in golden.io:
        features = model.vision(golden.io["images"].flatten(0, 1))
        assert_near(features.view_as(golden.io["image_embeddings"]), golden.io["image_embeddings"])
    has_leak = case == "flamingo_all_media"
    # There, text before the first tag reads later images; row 0 alone has no such text.
    rows = slice(0, 1 if has_leak else None)
    logits = model(text, **media_of(golden.io))
    assert_near(logits[rows], golden.io["logits"][rows])


def test_the_leak_of_the_reference_is_all_that_differs(parity, monkeypatch) -> None:
    """With a mean over all media in place of 0, text before its first tag gives its numbers."""
    golden, model = parity("flamingo_all_media"), reference(parity, "flamingo_all_media")
    ours = MaskedCrossAttention.forward

    def leaking(self: Any, x: Tensor, keys_values: Any, mask: Tensor) -> Tensor:
        mean = self.to_out(keys_values[1].mean(2).flatten(1))[:, None]
        return ours(self, x, keys_values, mask).where(mask.any(-1, keepdim=True), mean)

    monkeypatch.setattr(MaskedCrossAttention, "forward", leaking)
    assert_near(model(golden.io["text"], golden.io["images"]), golden.io["logits"])


@pytest.mark.parametrize("case", ["flamingo_vit", "flamingo_all_media"])
def test_no_image_changes_a_logit_before_its_tag(parity, case: str) -> None:
    golden, model = parity(case), reference(parity, case)
    text, images = golden.io["text"], golden.io["images"]
    before = model(text, images)
    for media in range(images.shape[1]):
        changed = images.clone()
        changed[:, media] = -changed[:, media]
        after = model(text, changed)
        for row in range(len(text)):
            tag = (text[row] == TAG).nonzero()[media, 0]
            assert torch.equal(after[row, :tag], before[row, :tag])
            assert not torch.allclose(after[row, tag], before[row, tag], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_to_reference_gives_the_same_file_again(parity, case: str) -> None:
    golden = parity(case)
    family, config, tensors = to_reference(reference(parity, case))
    # The head is stored once more than safetensors kept of it.
    assert family == "flamingo" and tensors.keys() == golden.weights.keys() | {
        "to_logits.1.weight"
    }
    assert all(torch.equal(tensors[key], value) for key, value in golden.weights.items())
    assert {key: config[key] for key in golden.config if key != "img_encoder"} == {
        key: value for key, value in golden.config.items() if key != "img_encoder"
    }
    again = from_reference(family, config, tensors)
    io = golden.io
    assert torch.equal(again.eval()(io["text"]), reference(parity, case)(io["text"]))


def test_an_open_flamingo_block_equals_the_reference(parity) -> None:
    golden = parity("open_flamingo_block")
    model = from_reference("open_flamingo_block", golden.config, golden.weights)
    latents, out = model(*(golden.io[name] for name in ("vision_x", "x", "media_locations")))
    assert_near(latents, golden.io["latents"])
    assert_near(out, golden.io["out"])
    family, config, tensors = to_reference(model)
    assert family == "open_flamingo_block" and config == golden.config
    assert tensors.keys() == golden.weights.keys()
    assert all(torch.equal(tensors[key], value) for key, value in golden.weights.items())


FUSED = "layers.3.0.fn.fused_attn_ff_proj.weight"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (FUSED, None, f"lacks {FUSED}"),
        (FUSED, torch.zeros(319, 32), rf"{FUSED} must be \(320, 32\), got \(319, 32\)"),
        (FUSED, [1, 2], rf"{FUSED} must be \(320, 32\), got list"),
        (FUSED.replace("3", "9"), torch.zeros(320, 32), "has layers.9.0.fn.fused_attn_ff_proj"),
        ("layers.1.1.attn_gate", torch.zeros(1), "has layers.1.1.attn_gate, the model does not"),
        ("to_logits.1.weight", torch.zeros(60, 32), "to_logits.1.weight must equal token_emb"),
        ("to_logits.0.beta", torch.ones(32), "to_logits.0.beta must be 0"),
        ("img_encoder.vit.pos_embedding", None, "lacks img_encoder.vit.pos_embedding"),
        ("perceiver_resampler.layers.1.0.to_q.weight", None, "lacks perceiver_resampler.layers.1"),
        (
            "layers.2.1.ff.3.weight",
            torch.zeros(32, 1),
            r"layers.2.1.ff.3.weight must be \(32, 128",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_in_one_line(parity, key, value, words) -> None:
    golden = parity("flamingo_vit")
    weights = golden.weights | {key: value}
    if value is None:
        del weights[key]
    with pytest.raises(ValueError, match=words) as caught:
        from_reference("flamingo", golden.config, weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["flamingo", "open_flamingo_block", "llama"])
def test_a_file_of_another_family_is_refused_by_a_tensors_name(parity, family: str) -> None:
    configs = {
        "flamingo": parity("flamingo_vit").config,
        "open_flamingo_block": parity("open_flamingo_block").config,
        "llama": parity("llava").config["text_config"],
    }
    for case in ["flamingo_palm", "open_flamingo_block", "llava", "ruclip"]:
        if case.startswith(family):
            continue
        with pytest.raises(ValueError, match=rf"{family}: the \w+ (has|lacks)") as caught:
            from_reference(family, configs[family], parity(case).weights)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"place": "before"}, {"offset": 1}, {"document_end_id": 2}, {"vision": None}]
)
def test_a_model_that_the_reference_cannot_express_is_refused(parity, change) -> None:
    model = reference(parity, "flamingo_vit")
    if "vision" in change:
        model.vision = None
    else:
        model.config = replace(model.config, **change)
    with pytest.raises(ValueError, match="flamingo: the reference cannot express") as caught:
        to_reference(model)
    assert "\n" not in str(caught.value)


@both_rules
@both_places
def test_closed_gates_give_the_logits_of_the_language_model(rule: str, place: str) -> None:
    model = model_of(replace(CONFIG, attend_to=rule, place=place), gate=0.0)
    expected = model.language_model(TEXT)
    assert torch.equal(model(TEXT, images_of()), expected)
    assert torch.equal(model(TEXT), expected)
    assert not torch.allclose(model_of()(TEXT, images_of()), expected, atol=1e-2)


def test_only_the_gates_get_gradients_in_the_first_step() -> None:
    model = model_of(gate=0.0)
    model.train_only("fusion")
    loss = nn.functional.cross_entropy(model(TEXT, images_of()).flatten(0, 1), TEXT.flatten())
    loss.backward()
    for name, value in model.named_parameters():
        has_gradient = value.grad is not None and bool(value.grad.any())
        assert has_gradient == name.endswith("_gate"), name


@both_places
@pytest.mark.parametrize(("every", "offset"), [(1, 0), (2, 1), (3, 2), (4, 0)])
def test_blocks_stand_where_the_config_says(place: str, every: int, offset: int) -> None:
    """Forward passes written out: which module runs after which."""
    model = model_of(replace(CONFIG, every=every, offset=offset, place=place))
    ran = []
    for layer, block in enumerate(model.language_model.layers):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(f"block {layer}"))
    for layer, block in model.cross_blocks.items():
        block.register_forward_hook(lambda *_, layer=layer: ran.append(f"cross {layer}"))
    model(TEXT, images_of())
    expected = []
    for layer in range(4):
        pair = [f"block {layer}"]
        if layer >= offset and (layer - offset) % every == 0:
            pair.insert(0 if place == "before" else 1, f"cross {layer}")
        expected += pair
    assert ran == expected


@both_rules
@both_places
def test_a_row_with_absent_media_is_the_row_alone(rule: str, place: str) -> None:
    """Absent at the end, at the start, or all of them; a second row has all three."""
    model = model_of(replace(CONFIG, attend_to=rule, place=place))
    text, images = TEXT[[0, 1]], images_of(2, 3)
    full = torch.cat([TEXT[1, :7], torch.tensor([TAG])])
    for present in ([1, 1, 0], [0, 1, 1], [1, 0, 1]):
        is_present = torch.tensor([present, [1, 1, 1]]).bool()
        logits = model(torch.stack([text[0], full]), images, media_present=is_present)
        assert_near(logits[:1], model(text[:1], images[:1, is_present[0]]))
        assert_near(logits[1:], model(full[None], images[1:]))
    plain = torch.tensor([[5, 4, 6, 7, 8, 9, 5, 4]])
    absent = torch.tensor([[0, 0, 0], [1, 1, 1]]).bool()
    logits = model(torch.cat([plain, full[None]]), images, media_present=absent)
    assert_near(logits[:1], model(plain, images[:1], media_present=absent[:1]))
    changed = model(torch.cat([plain, full[None]]), -images, media_present=absent)
    assert torch.equal(changed[0], logits[0])


@both_rules
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_the_logits_of_each_row(rule: str, side: str) -> None:
    model, images = model_of(replace(CONFIG, attend_to=rule)), images_of()
    lengths = (8, 5, 3)
    text, mask = torch.full((3, 8), TAG), torch.zeros(3, 8).bool()  # tags in padding do not count
    for row, length in enumerate(lengths):
        at = slice(8 - length, 8) if side == "left" else slice(0, length)
        text[row, at], mask[row, at] = TEXT[row, :length], True
    logits = model(text, images, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = model(TEXT[row : row + 1, :length], images[row : row + 1])
        assert_near(logits[row : row + 1, mask[row]], alone)


@both_rules
@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_without(rule: str) -> None:
    model = model_of(replace(CONFIG, attend_to=rule, document_end_id=2))
    images = images_of()
    text, mask = TEXT.clone(), torch.ones_like(TEXT)
    text[1, 5:], mask[1, 5:] = 2, 0  # padded by the end token
    text[2, :1], mask[2, :1] = 2, 0
    projections = []
    for block in model.cross_blocks.values():
        block.attn.to_kv.register_forward_hook(lambda *_: projections.append(1))
    memory = model.memory(model.latents(images, None))
    actual = model.generate_greedily(text, memory, num_tokens=5, attention_mask=mask)
    assert len(projections) == len(model.cross_blocks), "keys and values once per image"
    assert actual.shape == (3, 5) and not (actual == TAG).any()
    for row in range(3):
        sequence = text[row : row + 1, mask[row].bool()]
        for _ in range(5):
            logits = model(sequence, images[row : row + 1])[:, -1]
            logits[:, TAG] = -torch.inf
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(actual[row], sequence[0, -5:])


@torch.no_grad()
def test_decoding_without_media_is_the_language_models() -> None:
    model = model_of()
    likely = model(TEXT)[:, -1].argmax(-1)
    head = model.language_model.lm_head.weight
    head[TAG] = 2 * head[likely[0]]
    assert model(TEXT)[0, -1].argmax() == TAG, "the tag is the most likely token"
    actual = model.generate_greedily(TEXT, None, num_tokens=3)
    sequence = TEXT
    for _ in range(3):
        logits = model(sequence)[:, -1]
        logits[:, TAG] = -torch.inf
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(actual, sequence[:, -3:])


@both_rules
def test_a_packed_document_reads_no_media_of_the_one_before(rule: str) -> None:
    model = model_of(replace(CONFIG, attend_to=rule, document_end_id=2))
    text, images = torch.tensor([[TAG, 5, 2, 6, 7, TAG, 8]]), images_of(1, 2)
    memory = model.memory(model.resampler(model.vision(images[0])[None]))
    mask = model.latent_mask(text, memory, None, None).view(7, 2, 3).any(-1)
    assert mask[:, 0].tolist() == [True] * 3 + [False] * 4
    assert mask[:, 1].tolist() == [False] * 5 + [True] * 2


def test_padding_by_the_end_token_ends_no_document() -> None:
    model = model_of(replace(CONFIG, document_end_id=2))
    memory = model.memory(model.latents(images_of(2, 1), None))
    cache = FlamingoCache(model.language_model.new_cache(2, num_positions=4))
    prompt, is_token = torch.tensor([[TAG, 5, 2], [TAG, 5, 2]]), torch.ones(2, 3).bool()
    is_token[0, 2] = False
    model.latent_mask(prompt, memory, is_token, cache)
    mask = model.latent_mask(torch.tensor([[6], [6]]), memory, None, cache)
    assert mask.any(-1)[:, 0].tolist() == [True, False]


def test_features_computed_before_take_the_place_of_images() -> None:
    model, images = model_of(), images_of()
    features = model.vision(images.flatten(0, 1)).unflatten(0, (3, 2))
    blind = Flamingo(CONFIG)
    state = {key: value for key, value in model.state_dict().items() if "vision" not in key}
    blind.load_state_dict(state)
    memory = blind.memory(blind.resampler(features))
    logits = blind.language_model.logits(blind.hidden(TEXT, memory))
    assert torch.equal(logits, model(TEXT, images))
    with pytest.raises(ValueError, match="the model has no vision encoder"):
        blind(TEXT, images)


def test_a_video_of_one_frame_is_an_image_where_frames_have_no_embedding() -> None:
    model, images = model_of(), images_of()
    assert torch.equal(model(TEXT, videos=images[:, :, None]), model(TEXT, images))


@pytest.mark.parametrize(
    ("media", "words"),
    [
        ({"images": torch.zeros(3, 1, 3, 8, 8)}, "row 0: expected at most 1 media tags, .* got 2"),
        ({"images": torch.zeros(3, 3, 8, 8)}, r"images must be \(B, M, C, H, W\), got \(3, 3, 8"),
        ({"videos": images_of()}, r"videos must be \(B, M, F, C, H, W\), got \(3, 2, 3, 8, 8\)"),
        ({"images": images_of(), "videos": images_of()}, "expected images or videos, got both"),
        ({"images": torch.zeros(3, 0, 3, 8, 8)}, "at least one media per row, got 0"),
        ({"images": images_of(2)}, "expected media of 3 rows, got 2"),
        (
            {"images": images_of(), "media_present": torch.ones(3, 1).bool()},
            r"media_present must be \(3, 2\), got \(3, 1\)",
        ),
    ],
)
def test_media_that_do_not_fit_are_refused_in_one_line(media: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        model_of()(TEXT, **media)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vision", [LinearPatchEncoder(9, 4), nn.Flatten()])
def test_a_vision_encoder_without_features_of_patches_is_refused(vision: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"must return \(B, P, 10\), .*, got \(6, "):
        Flamingo(CONFIG, vision)(TEXT, images_of())


def test_a_vit_reads_images_of_its_size_alone() -> None:
    config = ViTConfig(8, 4, 10, 1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\), got \(2, 3, 8, 4\)"):
        ViT(config)(torch.zeros(2, 3, 8, 4))
    with pytest.raises(ValueError, match=r"image_size must be a multiple of patch_size \(3\)"):
        replace(config, patch_size=3)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        replace(config, dropout=1.0)


@pytest.mark.parametrize("parts", Flamingo.trained_choices)
def test_a_step_changes_exactly_the_trained_parts(parts: str) -> None:
    model = model_of()
    model.train_only(parts)
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    loss = nn.functional.cross_entropy(model(TEXT, images_of()).flatten(0, 1), TEXT.flatten())
    loss.backward()
    optimizer.step()
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    for name, value in model.named_parameters():
        is_trained = name.split(".")[0] in Flamingo.trained_choices[parts]
        assert (id(value) in held) == is_trained
        assert torch.equal(value, before[name]) != is_trained, name
    assert model.training and all(
        module.training == (name in Flamingo.trained_choices[parts])
        for name, module in model.named_children()
    )


def test_frozen_parts_have_no_dropout_however_the_model_is_switched() -> None:
    vit = ViTConfig(8, 4, 10, 1, 2, 4, 8, dropout=0.5, embedding_dropout=0.5)
    model = Flamingo(CONFIG, ViT(vit))
    model.train_only("fusion")
    model.eval()
    model.train()
    images = images_of()
    assert torch.equal(model(TEXT, images), model(TEXT, images))
    model.train_only("all")
    first = model.vision(images[:, 0])
    assert not torch.equal(first, model.vision(images[:, 0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"offset": 4}, r"offset must lie in \[0, 4\), got 4"),
        ({"place": "inside"}, "place must be one of before, after, got 'inside'"),
        ({"attend_to": "next"}, "attend_to must be one of immediate, all_previous, got 'next'"),
        ({"media_token_id": 20}, r"media_token_id must lie in \[0, 20\), got 20"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **change)


def count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


# Blocks and parameters of the resampler and of one block: D latents and text, I heads * size.
PUBLISHED = {
    "open_flamingo_3b": (24, 63_019_008, 36_708_354),
    "open_flamingo_9b": (8, 63_019_008, 139_476_994),
    "flamingo_3b": (24, None, None),
    "flamingo_9b": (10, None, None),
    "flamingo_80b": (12, None, None),
}


@pytest.mark.parametrize("name", FLAMINGO_SIZES)
def test_published_sizes_have_their_published_parameters(name: str) -> None:
    config = FLAMINGO_SIZES[name]
    with torch.device("meta"):
        model = Flamingo(config)
    num_blocks, in_resampler, in_block = PUBLISHED[name]
    assert len(model.cross_blocks) == num_blocks
    media, text = config.resampler.width, config.language_model.hidden_size
    inner = config.resampler.num_heads * config.resampler.head_size
    formula = config.resampler.num_latents * media + 2 * media
    formula += 6 * (4 * media + 4 * media * inner + 2 * media + 8 * media**2)
    formula += (config.resampler.num_frame_embeddings or 0) * media
    inner = config.cross_attention.num_heads * config.cross_attention.head_size
    block = 2 * text + 2 * text * inner + 2 * media * inner + 2 * text + 8 * text**2 + 2
    assert count(model.resampler) == formula == (in_resampler or formula)
    assert count(model.cross_blocks) == num_blocks * block == num_blocks * (in_block or block)


# The arguments of the example in flamingo-pytorch's README.
EXAMPLE = {
    "num_tokens": 20_000,
    "dim": 1024,
    "depth": 12,
    "heads": 8,
    "dim_head": 64,
    "media_token_id": TAG,
    "cross_attn_every": 3,
    "perceiver_num_latents": 64,
    "perceiver_depth": 2,
    "img_encoder": {
        "image_size": 256,
        "patch_size": 32,
        "num_classes": 1000,
        "dim": 1024,
        "depth": 6,
        "heads": 16,
        "mlp_dim": 2048,
        "dropout": 0.1,
        "emb_dropout": 0.1,
    },
}


def test_the_example_of_flamingo_pytorch_has_its_parameters() -> None:
    model = empty_model("flamingo", EXAMPLE)
    assert count(model.resampler) == 21_055_488
    assert [count(block) for block in model.cross_blocks.values()] == [10_489_858] * 4
    model.train_only("fusion")
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert (round(trained / 1e6, 1), round(count(model) / 1e6, 1)) == (63.0, 303.3)


def train(model: Flamingo, parts: str, *inputs: Tensor) -> list[float]:
    """The losses of a few steps on one batch, of the named parts alone."""
    model.train_only(parts)
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(8):
        logits = model(*inputs)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), inputs[0][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_example_of_flamingo_pytorch_learns_in_its_two_stages() -> None:
    """First text alone, then dialogues with images, while only the fusion is trained."""
    torch.manual_seed(0)
    language_model = LanguageModelConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=6,
        num_heads=2,
        num_key_value_heads=1,
        head_size=16,
        mlp_size=64,
        block="parallel",
        norm="layer",
        tied_embeddings=True,
    )
    config = FlamingoConfig(
        language_model,
        ResamplerConfig(width=24, num_layers=2, num_latents=4, num_heads=2, head_size=16),
        CrossAttentionConfig(num_heads=2, head_size=16),
        every=3,
        place="after",
    )
    # As wide as the resampler; unlike there, not as wide as the language model.
    model = Flamingo(config, ViT(ViTConfig(16, 8, 24, 2, 2, 8, 48, dropout=0.1)))
    text = torch.randint(4, 50, (2, 16))
    losses = train(model, "language_model", text)
    assert losses[-1] < losses[0]

    dialogue = torch.randint(4, 50, (4, 16))
    dialogue[:, [1, 9]] = TAG
    images = torch.randn(4, 2, 3, 16, 16)
    model.eval()
    assert torch.equal(model(dialogue, images), model(dialogue))
    frozen = [*model.language_model.parameters(), *model.vision.parameters()]
    before = [value.clone() for value in frozen]
    losses = train(model, "fusion", dialogue, images)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, kept) for value, kept in zip(frozen, before, strict=True))
