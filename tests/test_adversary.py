"""Discriminator and perceptual distance: the reference's sizes, and weights from a named file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import write

from rudolph.config.experiment_file import load_experiment
from rudolph.files.settings import ConfigError
from rudolph.training.adversary import (
    VGG16,
    PatchDiscriminator,
    PerceptualDistance,
    min_image_size,
)


def lpips_weights() -> dict[str, torch.Tensor]:
    """Return random weights under torchvision's and LPIPS' names."""
    generator = torch.Generator().manual_seed(0)
    tensors, width, at = {}, 3, 0
    for channels in VGG16:
        if channels is None:
            at += 1
            continue
        shape = (channels, width, 3, 3)
        scale = (2 / (9 * width)) ** 0.5
        tensors[f"features.{at}.weight"] = torch.randn(shape, generator=generator) * scale
        tensors[f"features.{at}.bias"] = torch.zeros(channels)
        width, at = channels, at + 2
    for index, size in enumerate((64, 128, 256, 512, 512)):
        tensors[f"lin{index}.model.1.weight"] = torch.rand((1, size, 1, 1), generator=generator)
    return tensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(lpips_weights(), path)
    return path


def test_the_discriminator_is_tamings() -> None:
    model = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_765_633
    with torch.device("meta"):
        logits = PatchDiscriminator()(torch.empty(1, 3, 256, 256))
    assert logits.shape == (1, 1, 30, 30)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_the_smallest_image_of_a_discriminator_gives_one_patch(num_layers: int) -> None:
    side = min_image_size(num_layers)
    assert num_layers != 3 or side == 24
    model = PatchDiscriminator(4, num_layers).eval()
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        model(torch.zeros(1, 3, side - 1, side - 1))


@pytest.mark.parametrize("side", [8, 16, 20])
def test_images_too_small_for_the_adversary_are_refused_with_the_file(
    tmp_path: Path, side: int
) -> None:
    small = f"data.image_size={side}", f"vqgan.resolution={side}"
    load_experiment(write(tmp_path), small)
    load_experiment(write(tmp_path), ("vqgan_losses.discriminator_start=0",))
    # A discriminator that starts after the last step is never used.
    load_experiment(write(tmp_path), (*small, "vqgan_losses.discriminator_start=8"))
    with pytest.raises(ConfigError, match=rf"image_size: expected at least 24 .* got {side}$"):
        load_experiment(write(tmp_path), (*small, "vqgan_losses.discriminator_start=7"))


def test_the_perceptual_distance_is_none_for_equal_images_and_grows(weights: Path) -> None:
    distance = PerceptualDistance(weights)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.randn_like(images)
    found = [distance(images, images + scale * noise) for scale in (0.0, 0.05, 0.3)]
    assert found[0].shape == (2,) and found[0].abs().max() == 0
    assert (found[1] > 0).all() and (found[2] > found[1]).all()


def test_the_perceptual_distance_has_a_gradient_for_images_and_none_for_itself(
    weights: Path,
) -> None:
    distance = PerceptualDistance(weights)
    images = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    distance(images, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing file", "no such file"),
        ("missing tensor", "expected a tensor lin2.model.1.weight"),
        ("wrong shape", r"features.0.weight: expected \[64, 3, 3, 3\], got \[64, 3, 3, 2\]"),
    ],
)
def test_a_file_of_weights_that_does_not_fit_is_named(
    tmp_path: Path, change: str, words: str
) -> None:
    path, tensors = tmp_path / "weights.safetensors", lpips_weights()
    if change == "missing tensor":
        del tensors["lin2.model.1.weight"]
    elif change == "wrong shape":
        tensors["features.0.weight"] = tensors["features.0.weight"][..., :2].contiguous()
    if change != "missing file":
        save_file(tensors, path)
    with pytest.raises(ValueError, match=words):
        PerceptualDistance(path)
