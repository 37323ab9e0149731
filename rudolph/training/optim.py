"""Optimizers, learning-rate schedule, gradient clipping and training precision.

Source: Loshchilov and Hutter (arXiv:1711.05101) for AdamW, and nanoGPT for the choice of tensors
that decay.  Muon is Jordan 2024, scaled as in Moonlight (arXiv:2502.16982).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rudolph.files.constraints import (
    Bounds,
    Count,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    check,
)
from rudolph.models.layers.native_types import has_native_bfloat16

# Bytes of state per parameter: two moments for AdamW, one momentum for Muon.
ADAMW_BYTES, ADAMW8BIT_BYTES, MUON_BYTES = 8, 2, 4
# Elements per batched product in Muon; a larger matrix uses all cores by itself.
MAX_STACK_ELEMENTS = 2**20


Optimizer = Literal["adamw", "muon", "adamw8bit"]


@dataclass(frozen=True)
class OptimConfig:
    """Settings of one training.

    The learning rate rises linearly over the warm-up and then falls along a cosine.

    Attributes:
        num_steps: optimizer steps; 0 trains nothing.
        global_batch_size: examples per step on all devices together.
        optimizer: ``adamw``; ``muon``, which trains hidden matrices and convolutions while AdamW
            trains all other parameters; or ``adamw8bit``, whose moments have 8 bits (CUDA and
            bitsandbytes).
        learning_rate: peak learning rate of AdamW.
        muon_learning_rate: peak learning rate of Muon.
        warmup_steps: steps until the peak.
        final_learning_rate_fraction: last learning rate as a fraction of the peak.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        weight_decay: decoupled weight decay.
        gradient_clip: largest norm of the gradient; null for no clipping.
        ema_decay: decay of the weight average that sampling uses; null for off.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints to resume from.

    Raises:
        ValueError: if a setting is out of range.
    """

    num_steps: NonNegativeInt = 1000
    global_batch_size: Count = 64
    optimizer: Optimizer = "adamw"
    learning_rate: Positive = 3e-4
    muon_learning_rate: Positive = 1e-2
    warmup_steps: NonNegativeInt = 100
    final_learning_rate_fraction: Fraction = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    weight_decay: NonNegative = 0.1
    gradient_clip: Positive | None = 1.0
    ema_decay: Annotated[float, Bounds(gt=0, lt=1)] | None = None
    validate_every: Count = 500
    checkpoint_every: Count = 200

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a setting is out of range."""
        check(self)


def learning_rate_fraction(step: int, config: OptimConfig) -> float:
    """Return the fraction of the peak learning rate at a step, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_steps = max(config.num_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / decay_steps, 1.0)
    final = config.final_learning_rate_fraction
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class Muon(torch.optim.Optimizer):
    """Muon: orthogonalised Nesterov momentum for matrices and convolution kernels.

    A kernel ``(O, I, h, w)`` is treated as a matrix ``(O, I * h * w)``.  For matrices this is
    ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, which accepts matrices only.
    Updates have the same RMS as AdamW's, so the same weight decay suits both.
    """

    momentum = 0.95

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; ``closure`` is ignored."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for parameters in _stacks(trained):
                momenta = torch.stack([self.nesterov_momentum(p) for p in parameters])
                updates = newton_schulz(momenta)
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def nesterov_momentum(self, parameter: Tensor) -> Tensor:
        """Add the gradient to its moving average and return Nesterov's momentum ``(O, I)``."""
        average = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        assert parameter.grad is not None
        average.lerp_(parameter.grad, 1 - self.momentum)
        return parameter.grad.lerp(average, self.momentum).flatten(1)


def _stacks(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of parameters of one matrix shape, at most ``MAX_STACK_ELEMENTS`` per list.

    A parameter with more than ``MAX_STACK_ELEMENTS`` elements is alone in its list.  A batched
    product of small matrices uses all cores, while one product after another does not.
    """
    stacks: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        key = (parameter.flatten(1).shape, parameter.dtype, parameter.device)
        stack = stacks.setdefault(key, [])
        if stack and (len(stack) + 1) * parameter.numel() > MAX_STACK_ELEMENTS:
            yield stacks.pop(key)
            stack = stacks.setdefault(key, [])
        stack.append(parameter)
    yield from stacks.values()


def newton_schulz(matrices: Tensor) -> Tensor:
    """Approximate the nearest orthogonal matrix of each ``(..., M, N)`` by Newton-Schulz.

    The five iterations need no more precision than bfloat16.  They run in bfloat16 if the device
    multiplies it natively, else in float32.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16 if has_native_bfloat16(matrices.device) else torch.float32)
    x = (x.mT if is_tall else x).reshape(-1, *sorted(x.shape[-2:]))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return (x.mT if is_tall else x).reshape(matrices.shape)


@dataclass(frozen=True)
class ParameterGroups:
    """Trained parameters, split by optimizer: Muon, AdamW with weight decay, AdamW without."""

    muon: list[nn.Parameter]
    decayed: list[nn.Parameter]
    kept: list[nn.Parameter]


def parameter_groups(model: nn.Module, config: OptimConfig) -> ParameterGroups:
    """Split the trained parameters of a model by optimizer and weight decay.

    Muon trains hidden matrices and kernels.  AdamW trains vectors, embeddings, and the layers from
    and to pixels or tokens.  Weight decay applies only to matrices and kernels.  Norms, biases,
    gates, embeddings, a codebook, and the tables that a module names in ``undecayed`` do not
    decay.
    """
    embeddings = {
        parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name == "to_logits"
        for parameter in module.parameters(recurse=False)
    }
    embeddings |= {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in getattr(module, "undecayed", ())
    }
    pixels = {
        parameter
        for name, parameter in model.named_parameters()
        if name in ("encoder.conv_in.weight", "decoder.conv_out.weight")
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2 and p not in embeddings]
    undecayed = [p for p in trained if p.dim() < 2 or p in embeddings]
    hidden = [p for p in matrices if p not in pixels] if config.optimizer == "muon" else []
    muon_parameters = set(hidden)
    return ParameterGroups(hidden, [p for p in matrices if p not in muon_parameters], undecayed)


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Create the optimizers for the trained parameters of a model.

    Raises:
        ValueError: if ``adamw8bit`` is set and the machine lacks CUDA or bitsandbytes.
    """
    parameters = parameter_groups(model, config)
    groups = [
        {"params": parameters.decayed, "weight_decay": config.weight_decay},
        {"params": parameters.kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = []
    if parameters.muon:
        weight_decay = config.weight_decay
        optimizers.append(
            Muon(parameters.muon, lr=config.muon_learning_rate, weight_decay=weight_decay)
        )
    if groups and config.optimizer == "adamw8bit":
        optimizers.append(eight_bit_adamw()(groups, lr=config.learning_rate, betas=betas))
    elif groups:
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=betas, fused=True))
    return optimizers


def eight_bit_adamw(kind: str = "cuda") -> Any:
    """Return bitsandbytes' AdamW class, whose moments have 8 bits.

    Args:
        kind: the kind of device, which must be ``cuda``.

    Raises:
        ValueError: if the device is not CUDA, CUDA is unavailable, or bitsandbytes is missing.
    """
    if kind != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            "optimizer adamw8bit: expected a CUDA GPU, got none. Use adamw, its 32-bit version"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer adamw8bit: bitsandbytes is missing. Run: pip install bitsandbytes"
        ) from error
    return AdamW8bit


def optimizer_bytes(model: nn.Module, config: OptimConfig) -> int:
    """Compute the size of the optimizer state in bytes."""
    groups = parameter_groups(model, config)
    num_muon = sum(parameter.numel() for parameter in groups.muon)
    num_adamw = sum(parameter.numel() for parameter in (*groups.decayed, *groups.kept))
    adamw_bytes = ADAMW8BIT_BYTES if config.optimizer == "adamw8bit" else ADAMW_BYTES
    return MUON_BYTES * num_muon + adamw_bytes * num_adamw


def clip_gradients(
    optimizers: Sequence[torch.optim.Optimizer], config: OptimConfig, *, scale: float = 1.0
) -> None:
    """Scale all gradients of a network down to the norm ``gradient_clip``, if one is set.

    Args:
        optimizers: the optimizers that hold the network's parameters.
        config: the settings with ``gradient_clip``.
        scale: the factor by which the gradients are too large, such as the scale of a gradient
            scaler.
    """
    if config.gradient_clip is not None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        clip_grad_norm_(parameters, scale * config.gradient_clip)


def warmup_cosine(optimizer: torch.optim.Optimizer, config: OptimConfig) -> LambdaLR:
    """Return the learning-rate schedule of ``learning_rate_fraction`` for an optimizer."""
    return LambdaLR(optimizer, lambda step: learning_rate_fraction(step, config))


def machine_precision(kind: str | None = None) -> str:
    """Return ``bf16-mixed`` if a device multiplies bfloat16 natively, else ``32-true``.

    Args:
        kind: ``cpu``, ``cuda`` or ``mps``; None means CUDA if available, else the CPU.
    """
    device = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16-mixed" if has_native_bfloat16(device) else "32-true"
