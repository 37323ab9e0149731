"""Reconstruction losses beyond the pixel loss: a patch discriminator and LPIPS.

Source: taming-transformers, ``modules/discriminator/model.py`` and ``modules/losses/lpips.py``;
Isola 2017 (PatchGAN) and Zhang 2018 (LPIPS).

Shapes: B batch, H and W pixels.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

# Channels of VGG16's convolutions; None halves the image.  LPIPS compares the feature maps before
# each halving, and the last ones.
VGG16 = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512)
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)


NUM_LAYERS = 3


def min_image_size(num_layers: int = NUM_LAYERS) -> int:
    """Return the smallest image side that a patch discriminator can process, in pixels.

    The discriminator halves the image ``num_layers`` times, and each of two convolutions with
    kernel size 4 needs one more pixel.
    """
    return 3 * int(2**num_layers)


class PatchDiscriminator(nn.Module):
    """A PatchGAN: maps images ``(B, 3, H, W)`` in [-1, 1] to a grid of real-or-fake logits."""

    def __init__(self, channels: int = 64, num_layers: int = NUM_LAYERS) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            wider = channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit per patch of images ``(B, 3, H, W)`` in [-1, 1]; high means real."""
        return self.main(images)


class PerceptualDistance(nn.Module):
    """LPIPS ``(B,)`` of two batches of images in [-1, 1], with weights from a given file.

    Args:
        path: a safetensors file with torchvision's ``features.N.weight`` and ``.bias`` of VGG16,
            and with LPIPS' ``lin0.model.1.weight`` to ``lin4.model.1.weight``.

    Raises:
        ValueError: if the file is missing, lacks a tensor or has a tensor of another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise ValueError(
                f"{path}: no such file. Give a safetensors file of VGG16 and LPIPS weights"
            )
        self.features = _vgg16()
        self.heads = nn.ModuleList(
            nn.Conv2d(size, 1, 1, bias=False) for size in (64, 128, 256, 512, 512)
        )
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE)[:, None, None])
        self._load(load_file(path), path)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance ``(B,)`` between images ``(B, 3, H, W)`` in [-1, 1]."""
        total = torch.zeros(len(first), device=first.device)
        pairs = zip(self._maps(first), self._maps(second), strict=True)
        for head, (left, right) in zip(self.heads, pairs, strict=True):
            total = total + head((left - right).pow(2)).mean((1, 2, 3))
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        x, maps = (images - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(F.normalize(x, dim=1, eps=1e-10))
            x = layer(x)
        return [*maps, F.normalize(x, dim=1, eps=1e-10)]

    def _load(self, tensors: dict[str, Tensor], path: str | Path) -> None:
        parameters: dict[str, Tensor] = {
            f"lin{index}.model.1.weight": head.get_parameter("weight")
            for index, head in enumerate(self.heads)
        }
        parameters |= {
            f"features.{name}": value for name, value in self.features.named_parameters()
        }
        for name, parameter in parameters.items():
            if name not in tensors:
                raise ValueError(f"{path}: expected a tensor {name}, got none")
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name}: expected {list(parameter.shape)}, "
                    f"got {list(tensors[name].shape)}"
                )
            parameter.data.copy_(tensors[name])


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for channels in VGG16:
        if channels is None:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            width = channels
    return nn.Sequential(*layers)
