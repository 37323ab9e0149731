"""Vision encoders: features of any layer, a convolutional encoder, and merges of encoders."""

import pytest
import torch
from torch import nn

from rudolph.models.vision.clip import CLIP, CLIPConfig, VisionConfig, VisionEncoder
from rudolph.models.vision.conv import ConvEncoder, ConvEncoderConfig
from rudolph.models.vision.encoders import VisionEncodersConfig, build_vision_encoders
from rudolph.models.vision.features import FeatureConfig, ViTFeatures
from rudolph.models.vision.merge import MERGES

VISION = VisionConfig(12, 4, 16, 3, 2, 24, activation="gelu")
CONV = ConvEncoderConfig(12, (5, 7), (1, 2), kernel_size=3)
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def vit(layers: tuple[int, ...], select: str = "patch") -> ViTFeatures:
    torch.manual_seed(0)
    return ViTFeatures(VisionEncoder(VISION), FeatureConfig(layers, select)).eval()


def conv(config: ConvEncoderConfig = CONV) -> ConvEncoder:
    torch.manual_seed(1)
    model = ConvEncoder(config)
    for block in model.levels.modules():
        if hasattr(block, "scale"):
            nn.init.ones_(block.scale)  # else a block is the identity to six digits
    return model


def hooked_states(encoder: VisionEncoder) -> list[torch.Tensor]:
    """Input of the first layer and outputs of all, caught while the whole encoder runs."""
    states: list[torch.Tensor] = []
    blocks = encoder.transformer.resblocks
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    handles += [
        block.register_forward_hook(lambda *args: states.append(args[-1])) for block in blocks
    ]
    encoder.transformer(encoder.embed(IMAGES))
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("layer", range(-4, 4))
def test_a_layer_is_a_hidden_state_of_the_whole_encoder(layer: int) -> None:
    states = hooked_states(vit((layer,)).encoder)
    for select, expected in (("full", states[layer]), ("patch", states[layer][:, 1:])):
        model = vit((layer,), select)
        found = model(IMAGES)
        torch.testing.assert_close(found, expected)
        assert found.shape == (2, model.num_tokens, model.width)


def test_several_layers_are_concatenated_by_channel_in_their_order() -> None:
    model = vit((-2, 1, 0))
    parts = [vit((layer,))(IMAGES) for layer in (-2, 1, 0)]
    torch.testing.assert_close(model(IMAGES), torch.cat(parts, dim=-1))
    assert model.width == 48


def test_the_class_feature_is_what_clip_projects() -> None:
    torch.manual_seed(0)
    config = CLIPConfig(8, 12, 2, 128, 4, 5, 20, 16, 2, 1)
    clip = CLIP(config).eval()
    pooled = ViTFeatures(clip.visual, FeatureConfig((-1,), "class"))(IMAGES)
    torch.testing.assert_close(pooled[:, 0] @ clip.visual.proj, clip.encode_image(IMAGES))


def test_layers_after_the_last_one_read_are_not_computed() -> None:
    model, blocks = vit((-2, 1)), []
    for index, block in enumerate(model.encoder.transformer.resblocks):
        block.register_forward_hook(lambda *args, index=index: blocks.append(index))
    model(IMAGES)
    assert blocks == [0, 1]


def test_the_default_vision_transformer_has_the_parameters_of_vit_l_14_at_336_pixels() -> None:
    with torch.device("meta"):
        model = VisionEncoder(VisionConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 303_507_456


def test_a_convolution_moves_its_tokens_with_the_image() -> None:
    config = ConvEncoderConfig(32, (6, 8), (1, 1), kernel_size=3)
    model, side = conv(config), 32 // config.factor
    images = torch.randn(1, 3, 32, 32)
    moved = images.roll((config.factor, 2 * config.factor), dims=(2, 3))
    before, after = (model(x).unflatten(1, (side, side)) for x in (images, moved))
    # Away from the border, whose zero padding changes a convolution.
    torch.testing.assert_close(after[:, 3:-2, 4:-2], before[:, 2:-3, 2:-4])
    assert not torch.allclose(after[:, 2:-2, 3:-2], before[:, 2:-2, 2:-3])


def conv_parameters(config: ConvEncoderConfig) -> int:
    count = config.widths[0] * (3 * config.stem_size**2 + 3) + 2 * config.widths[-1]
    for width, depth in zip(config.widths, config.depths, strict=True):
        count += depth * width * (config.kernel_size**2 + 1 + 2 + 8 * width + 5 + 1)
    for before, after in zip(config.widths, config.widths[1:], strict=False):
        count += 2 * before + after * (4 * before + 1)
    return count


@pytest.mark.parametrize("config", [CONV, ConvEncoderConfig()])
def test_a_convolutional_encoder_has_the_parameters_of_its_formula(config) -> None:
    with torch.device("meta"):
        model = ConvEncoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == conv_parameters(config)


def test_convnext_t_has_its_parameter_count() -> None:
    """28.6 M with its classifier of 1000 classes, 768,000 weights and as many biases."""
    config = ConvEncoderConfig(224, (96, 192, 384, 768), (3, 3, 9, 3), stem_size=4)
    assert conv_parameters(config) + 769_000 == 28_589_128


def test_merges_are_concatenations_and_a_sum() -> None:
    first, second = vit((-2,)), conv()
    x, y = first(IMAGES), second(IMAGES)
    merged = {kind: merge([first, second]) for kind, merge in MERGES.items()}
    for kind, model in merged.items():
        built = build_vision_encoders(VisionEncodersConfig((VISION, CONV), merge=kind))
        assert built.state_dict().keys() == model.state_dict().keys()
        built.load_state_dict(model.state_dict())
        torch.testing.assert_close(built(IMAGES), model(IMAGES))
    torch.testing.assert_close(merged["channels"](IMAGES), torch.cat([x, y], dim=-1))
    for kind in ("tokens", "sum"):
        projected = merged[kind].project[1](y)
        expected = x + projected if kind == "sum" else torch.cat([x, projected], dim=1)
        torch.testing.assert_close(merged[kind](IMAGES), expected)
    for model in merged.values():
        assert model(IMAGES).shape == (2, model.num_tokens, model.width)
        assert model.grid[0] * model.grid[1] == model.num_tokens


@pytest.mark.parametrize("kind", MERGES)
def test_a_gradient_reaches_every_encoder(kind: str) -> None:
    model = MERGES[kind]([conv(), conv()])
    model(IMAGES).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["channels", "sum"])
def test_unequal_grids_are_named(kind: str) -> None:
    words = f"merge {kind}: expected equal grids of tokens, got 3x3 and 1x10"
    with pytest.raises(ValueError, match=words):
        MERGES[kind]([vit((-1,)), vit((-1,), "full")])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vit((4,)), "layers: expected -4 to 3, got 4"),
        (lambda: vit(()), "layers: expected at least one"),
        (lambda: vit((0,), "cls"), "select: expected one of patch, full, class, got 'cls'"),
        (lambda: vit((0,))(IMAGES[..., 1:]), r"expected \(P, 3, 12, 12\), got \(2, 3, 12, 11\)"),
        (lambda: conv()(IMAGES[..., 1:]), r"expected \(P, 3, 12, 12\), got \(2, 3, 12, 11\)"),
        (lambda: VisionConfig(12, 5), r"image_size: expected a multiple of patch_size \(5\)"),
        (lambda: VisionConfig(activation="relu"), "activation: expected one of quick_gelu, gelu"),
        (lambda: VisionConfig(num_layers=0), "num_layers: expected at least 1, got 0"),
        (lambda: VisionEncodersConfig(merge="mean"), "merge: expected one of channels, tokens"),
        (lambda: VisionEncodersConfig(()), r"expected one image_size for all, got \[\]"),
        (
            lambda: VisionEncodersConfig((VISION, ConvEncoderConfig())),
            r"encoders: expected one image_size for all, got \[12, 64\]",
        ),
        (lambda: ConvEncoderConfig(30), "image_size: expected a multiple of 8"),
        (lambda: ConvEncoderConfig(depths=(1, 2)), "one entry for each of 3 widths, got 2"),
        (lambda: ConvEncoderConfig(depths=(1, 0, 2)), "expected at least 1"),
        (lambda: ConvEncoderConfig(kernel_size=4), "kernel_size: expected an odd number, got 4"),
    ],
)
def test_what_does_not_fit_is_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
