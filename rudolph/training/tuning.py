"""Fine-tuning of parts of a decoder: freezing by part and low-rank updates (LoRA).

To add a part, name it in ``FREEZABLE_PARTS`` with the pattern of its parameters.

Source: ru-dolph's fine-tuning notebooks (``freeze``, whose ``freeze_attn`` matches no parameter);
Emojich (arXiv:2112.02448), which freezes attention and MLP.
"""

import re
from dataclasses import dataclass

from torch import nn

from rudolph.models.layers.lora import add_low_rank
from rudolph.models.rudolph.decoder import MaskedDecoder

FREEZABLE_PARTS = {
    "all": r".+",
    "embeddings": r"\w+_(embedding|position)\..+",
    "attention": r"layers\.\d+\.to_(qkv|out)\..+",
    "mlp": r"layers\.\d+\.mlp_(in|out)\..+",
    "norms": r"(layers\.\d+\.)?\w+_norm\..+",
    "head": r"to_logits\..+",
    "layers": r"layers\.\d+\..+",
}
IN_LAYERS = ("attention", "mlp", "norms", "layers")


@dataclass(frozen=True)
class TuningConfig:
    """The frozen parts and the low-rank updates of a training.

    A part is written ``mlp``, or ``mlp(0-11)`` for layers 0 to 11.

    Attributes:
        frozen: parts that are not updated.
        lora_rank: rank of the low-rank updates; null for none.  They are trained instead of the
            weights of ``lora_target_modules`` and merged at the end.
        lora_alpha: the updates are scaled by ``lora_alpha / lora_rank``.
        lora_target_modules: parts whose linear layers get low-rank updates.

    Raises:
        ValueError: if a part is unknown, or the rank or alpha is out of range.
    """

    frozen: tuple[str, ...] = ()
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    lora_target_modules: tuple[str, ...] = ("attention",)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a part is unknown, or the rank or alpha is out of range."""
        for name in ("frozen", "lora_target_modules"):
            for part in getattr(self, name):
                _pattern_and_layers(name, part)
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1 or null, got {self.lora_rank}")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")


def apply_tuning(model: MaskedDecoder, config: TuningConfig) -> None:
    """Freeze parts of a model and add the configured low-rank updates.

    Raises:
        ValueError: if a part names layers beyond the model's depth, or nothing is left to train.
    """
    for part in config.frozen:
        for name in _parameters_of(model, "frozen", part):
            model.get_parameter(name).requires_grad_(False)
    if config.lora_rank is not None:
        for part in config.lora_target_modules:
            names = {
                name.rpartition(".")[0]
                for name in _parameters_of(model, "lora_target_modules", part)
            }
            for name in sorted(names):
                layer = model.get_submodule(name)
                if isinstance(layer, nn.Linear) and not hasattr(layer, "parametrizations"):
                    add_low_rank(layer, rank=config.lora_rank, alpha=config.lora_alpha)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model.tuning.frozen: expected a part to train, got a decoder that is all frozen"
        )


def _parameters_of(model: MaskedDecoder, field: str, part: str) -> list[str]:
    pattern, layers = _pattern_and_layers(field, part)
    last_layer = model.config.num_layers - 1
    if layers is not None and layers[1] > last_layer:
        raise ValueError(f"model.tuning.{field}: expected layers 0 to {last_layer}, got {part!r}")
    names = []
    for name, _ in model.named_parameters():
        layer = re.match(r"layers\.(\d+)\.", name)
        is_inside = layers is None or (layer and layers[0] <= int(layer[1]) <= layers[1])
        if re.fullmatch(pattern, name) and is_inside:
            names.append(name)
    return names


def _pattern_and_layers(field: str, part: str) -> tuple[str, tuple[int, int] | None]:
    match = re.fullmatch(r"(\w+)(?:\((\d+)-(\d+)\))?", part)
    if match is None or match[1] not in FREEZABLE_PARTS:
        known = ", ".join(FREEZABLE_PARTS)
        raise ValueError(f"{field}: expected one of {known}, as in mlp or mlp(0-3), got {part!r}")
    if match[2] is None:
        return FREEZABLE_PARTS[match[1]], None
    if match[1] not in IN_LAYERS or int(match[2]) > int(match[3]):
        raise ValueError(
            f"{field}: expected a range, first to last, of {', '.join(IN_LAYERS)}, got {part!r}"
        )
    return FREEZABLE_PARTS[match[1]], (int(match[2]), int(match[3]))
