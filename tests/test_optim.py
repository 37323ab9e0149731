"""Optimizers compared with torch's, and the parameters that each of them updates."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.training import optim
from rudolph.training.optim import (
    Muon,
    OptimConfig,
    build_optimizers,
    learning_rate_fraction,
    newton_schulz,
)


def randoms(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 7), (6, 6)])
@pytest.mark.parametrize(("is_native", "tolerance"), [(True, 1e-6), (False, 2e-3)])
def test_on_matrices_muon_is_that_of_torch(
    shape: tuple[int, int],
    is_native: bool,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Muon of torch multiplies in bfloat16; ours uses float32 if bfloat16 is emulated."""
    monkeypatch.setattr(optim, "has_native_bfloat16", lambda device: is_native)
    ours = nn.Parameter(randoms(*shape, seed=0))
    theirs = copy.deepcopy(ours)
    optimizers = [
        Muon([ours], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = randoms(*shape, seed=step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-5)


def test_muon_moves_a_kernel_as_the_matrix_of_its_rows() -> None:
    kernel = nn.Parameter(randoms(6, 3, 3, 2, seed=0))
    matrix = nn.Parameter(kernel.detach().reshape(6, 18).clone())
    for parameter in (kernel, matrix):
        optimizer = Muon([parameter], lr=0.02, weight_decay=0.1)
        for step in range(3):
            parameter.grad = randoms(6, 18, seed=step + 1).view_as(parameter)
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix)


@pytest.mark.parametrize("most", [1, 2 * 5 * 9, optim.MAX_STACK_ELEMENTS])
def test_muon_moves_stacked_matrices_as_each_alone(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "has_native_bfloat16", lambda device: False)
    monkeypatch.setattr(optim, "MAX_STACK_ELEMENTS", most)
    shapes = [(5, 9), (9, 5), (5, 9), (5, 3, 3), (5, 9), (9, 5)]
    together = [nn.Parameter(randoms(*shape, seed=at)) for at, shape in enumerate(shapes)]
    alone = copy.deepcopy(together)
    optimizers = [Muon(together, lr=0.02, weight_decay=0.1)]
    optimizers += [Muon([parameter], lr=0.02, weight_decay=0.1) for parameter in alone]
    for step in range(3):
        for at, pair in enumerate(zip(together, alone, strict=True)):
            for parameter in pair:
                # One parameter has no gradient in the first step and must not change.
                is_used = step or at != 2
                gradient = randoms(*shapes[at], seed=10 * step + at)
                parameter.grad = gradient if is_used else None
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_orthogonal_matrix_has_the_directions_of_the_svd() -> None:
    matrix = randoms(7, 4, seed=3)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diagonal(left.T @ newton_schulz(matrix).float() @ right.T)
    # Five iterations bring the singular values into this band, not to 1.
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_momentum_goes_with_the_state_of_the_optimizer() -> None:
    straight = nn.Parameter(randoms(4, 3, seed=0))
    stopped = copy.deepcopy(straight)
    first = Muon([straight], lr=0.1, weight_decay=0.0)
    second = Muon([stopped], lr=0.1, weight_decay=0.0)
    for step in range(4):
        straight.grad, stopped.grad = (randoms(4, 3, seed=step) for _ in range(2))
        first.step()
        second.step()
        fresh = Muon([stopped], lr=0.1, weight_decay=0.0)
        fresh.load_state_dict(copy.deepcopy(second.state_dict()))
        second = fresh
    assert torch.equal(straight, stopped)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(kind: str) -> None:
    model = VQGAN(VQGANConfig(resolution=8, channels=(4, 6), attention_resolutions=(4,)))
    optimizers = build_optimizers(model, OptimConfig(optimizer=kind, weight_decay=0.3))
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    moved = [parameter for _, group in groups for parameter in group["params"]]
    assert len(moved) == len(set(moved)) == len(list(model.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer, group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            decays = parameter.dim() > 1 and name != "quantize.embed.weight"
            assert group["weight_decay"] == (0.3 if decays else 0.0)
            is_outer = name in ("encoder.conv_in.weight", "decoder.conv_out.weight")
            by_muon = kind == "muon" and decays and not is_outer
            assert isinstance(optimizer, Muon) == by_muon


def test_the_learning_rate_rises_then_falls_to_its_share() -> None:
    config = OptimConfig(num_steps=100, warmup_steps=10, final_learning_rate_fraction=0.2)
    shares = [learning_rate_fraction(step, config) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[10] == pytest.approx(1.0)
    assert shares[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))
