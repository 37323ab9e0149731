"""The KL autoencoder: equal to diffusers', its KL equal to what samples say."""

import pytest
import torch

from rudolph.models.reference import from_reference, to_reference
from rudolph.models.vqgan.kl import (
    KL_REDUCTIONS,
    LOGVAR_BOUNDS,
    KLAutoencoder,
    KLAutoencoderConfig,
    gaussian_kl,
    kl_per_image,
)

SMALL = KLAutoencoderConfig(8, (8, 12), 1, latent_channels=3, norm_groups=4)


def small_autoencoder() -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(SMALL)


@torch.no_grad()
def test_it_equals_diffusers(parity) -> None:
    golden = parity("kl_autoencoder")
    model = from_reference("kl_autoencoder", golden.config, golden.weights).eval()
    mean, logvar = model.encode(golden.io["images"])
    found = {"mean": mean, "logvar": logvar, "decoded": model.decode(mean)}
    for name, value in found.items():
        torch.testing.assert_close(value, golden.io[name], atol=1e-5, rtol=0)
    # A sum of 192 terms, so relative.
    torch.testing.assert_close(kl_per_image(mean, logvar), golden.io["kl"], atol=0, rtol=1e-5)


def test_to_reference_gives_the_same_file_again(parity) -> None:
    golden = parity("kl_autoencoder")
    model = from_reference("kl_autoencoder", golden.config, golden.weights)
    family, config, tensors = to_reference(model)
    assert (family, config) == ("kl_autoencoder", golden.config)
    assert tensors.keys() == golden.weights.keys()
    assert all(torch.equal(tensors[key], value) for key, value in golden.weights.items())


def test_names_of_attention_in_older_files_load_too(parity) -> None:
    golden = parity("kl_autoencoder")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in golden.weights.items():
        for new, before in old.items():
            key = key.replace(f".{new}.", f".{before}.")
        weights[key] = value
    assert weights.keys() != golden.weights.keys()
    model = from_reference("kl_autoencoder", golden.config, weights)
    stored = to_reference(model).state_dict
    assert all(torch.equal(stored[key], value) for key, value in golden.weights.items())


def test_the_default_size_has_the_parameter_count_of_stable_diffusion() -> None:
    with torch.device("meta"):
        model = KLAutoencoder(KLAutoencoderConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863


def test_the_closed_form_equals_a_monte_carlo_estimate() -> None:
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    shape, generator = (20_000, 2, 3), torch.Generator().manual_seed(0)
    z = small_autoencoder().sample(mean.expand(shape), logvar.expand(shape), generator)
    own = torch.distributions.Normal(mean, (logvar / 2).exp())
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    ratio = own.log_prob(z) - unit.log_prob(z)
    # Five standard errors of the estimate.
    error = 5 * ratio.std(0) / len(z) ** 0.5
    assert ((ratio.mean(0) - gaussian_kl(mean, logvar)).abs() < error).all()
    assert error.max() < 0.1


def test_a_unit_gaussian_has_no_kl_and_a_mean_is_a_sum_over_latents() -> None:
    zero = torch.zeros(2, 3, 4, 5)
    assert all(reduce(zero, zero) == 0 for reduce in KL_REDUCTIONS.values())
    mean, logvar = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    by_name = {name: reduce(mean, logvar) for name, reduce in KL_REDUCTIONS.items()}
    torch.testing.assert_close(by_name["sum"], by_name["mean"] * 3 * 4 * 5)


def test_training_reaches_every_parameter_and_a_seed_repeats() -> None:
    model, images = small_autoencoder(), torch.rand(2, 3, 6, 8) * 2 - 1
    first, again = (model(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert first.images.shape == images.shape
    ((first.images - images).abs().mean() + first.kl).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@torch.no_grad()
def test_log_variances_stay_within_their_bounds() -> None:
    model = small_autoencoder()
    with torch.no_grad():
        model.quant_conv.bias.copy_(torch.tensor([-1e3, 0.0, 1e3, -1e3, 0.0, 1e3]))
    mean, logvar = model.encode(torch.randn(1, 3, 8, 8))
    assert (float(logvar.min()), float(logvar.max())) == LOGVAR_BOUNDS
    assert float(mean.max()) > 900


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up_block_types": ["UpDecoderBlock2D", "Up", "UpDecoderBlock2D"]}, "up_block_types"),
        ({"use_quant_conv": False}, "use_quant_conv: expected True, got False"),
        ({"latent_channels": 0}, "latent_channels: expected at least 1, got 0"),
        ({"scaling_factor": 0.0}, "scaling_factor: expected above 0"),
        ({"sample_size": 30}, "resolution must be a multiple"),
        ({"latent_channels": 5}, r"must be \(\d+,.*got \("),
        ({"block_out_channels": [16, 32, 48]}, "lacks encoder.down_blocks.2.res"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(parity, change: dict, words: str) -> None:
    golden = parity("kl_autoencoder")
    with pytest.raises(ValueError, match=words) as caught:
        from_reference("kl_autoencoder", golden.config | change, golden.weights)
    assert "\n" not in str(caught.value)


def test_sizes_and_reductions_are_checked() -> None:
    with pytest.raises(ValueError, match="multiples of 2, got 8 x 7"):
        small_autoencoder().encode(torch.zeros(1, 3, 8, 7))
    with pytest.raises(ValueError, match="expected one of sum, mean, got 'total'"):
        KLAutoencoderConfig(kl_reduction="total")
