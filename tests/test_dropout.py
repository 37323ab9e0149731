"""Dropout: the fraction, the scale, the gradient and the seed."""

import pytest
import torch
from torch.nn import functional as F

from rudolph.models.layers.dropout import apply_dropout


@pytest.mark.parametrize("share", [0.1, 0.37, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_falls_and_the_mean_stays(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 997, dtype=dtype)
    found = apply_dropout(x, share)
    kept = torch.tensor(1 / (1 - share)).to(dtype)
    assert found.dtype == dtype and set(found.unique().tolist()) == {0.0, kept.item()}
    torch.manual_seed(0)
    expected = (F.dropout(x, share) == 0).float().mean()
    # Both are means over 300,000 random numbers.
    assert abs((found == 0).float().mean() - expected) < 0.005
    # Neighbours drop independently, although one random number decides for four.
    pairs = (found == 0).flatten()[:300_000].view(-1, 2).all(1).float().mean()
    assert abs(pairs - share**2) < 0.006


def test_what_fell_has_no_gradient_and_the_seed_decides() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    torch.manual_seed(3)
    found = apply_dropout(x, 0.5)
    found.sum().backward()
    assert torch.equal(x.grad, torch.where(found == 0, 0.0, 2.0))
    torch.manual_seed(3)
    assert torch.equal(apply_dropout(x, 0.5), found)
    assert not torch.equal(apply_dropout(x, 0.5), found)


def test_the_ends_are_torchs() -> None:
    x = torch.randn(4, 3)
    assert torch.equal(apply_dropout(x, 0.0), x)
    assert torch.equal(apply_dropout(x, 1.0), torch.zeros_like(x))
