"""The VQ-GAN: equal to Sber's, any size, and quantizers with round trips and gradients."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rudolph.models.vqgan import codes
from rudolph.models.vqgan.codes import codebook_usage, largest_logit, nearest_codes
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.models.vqgan.quantizers import QUANTIZERS, QuantizerConfig

QUANTIZER = QuantizerConfig("vq", 30, 12, levels=(5, 3, 2))
SMALL = VQGANConfig(16, (8, 12, 16), 1, (4,), 10, quantizer=QUANTIZER)


def small_vqgan(kind: str) -> VQGAN:
    torch.manual_seed(0)
    num_codes = 32 if kind == "lfq" else QUANTIZER.num_codes
    quantizer = replace(QUANTIZER, kind=kind, num_codes=num_codes)
    return VQGAN(replace(SMALL, quantizer=quantizer))


def test_sber_vqgan_equals_the_reference(parity) -> None:
    golden = parity("sber_vqgan")
    config = VQGANConfig(
        32, (32, 32, 64, 64), 1, (4,), 16, quantizer=QuantizerConfig("gumbel", 64, 16)
    )
    model = VQGAN(config).eval()
    weights = {key.removeprefix("model."): value for key, value in golden.weights.items()}
    assert not any(model.load_state_dict(weights))
    indices = model.encode_indices(golden.io["images"])
    assert torch.equal(indices, golden.io["indices"])
    torch.testing.assert_close(
        model.decode_indices(indices), golden.io["decoded"], atol=1e-5, rtol=0
    )


def test_the_default_size_has_sbers_parameter_count() -> None:
    with torch.device("meta"):
        model = VQGAN(VQGANConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 68_995_971


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 12)])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_indices_decode_to_what_the_forward_pass_makes(kind: str, size: tuple[int, int]) -> None:
    model = small_vqgan(kind)
    images = torch.rand(3, 3, *size) * 2 - 1
    model(images)  # the EMA codebook is initialised from the first batch
    model.eval()
    result = model(images)
    indices = model.encode_indices((images + 1) / 2)
    assert torch.equal(indices, result.indices.flatten(1))
    decoded = model.decode_indices(indices, height=size[0] // 4)
    # Straight-through adds and subtracts z, and norms amplify the rounding error.
    torch.testing.assert_close(decoded, ((result.images + 1) / 2).clamp(0, 1), atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_gradient_reaches_the_encoder_through_every_quantizer(kind: str) -> None:
    model = small_vqgan(kind)
    result = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    result.images.square().mean().backward()
    gradient = model.encoder.conv_in.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert result.indices.min() >= 0
    assert result.indices.max() < model.config.quantizer.num_codes


def test_nearest_is_the_nearest_by_plain_distances() -> None:
    vectors, codebook = torch.randn(40, 5), torch.randn(13, 5)
    plain = (vectors[:, None] - codebook[None]).pow(2).sum(-1).argmin(1)
    assert torch.equal(nearest_codes(vectors, codebook), plain)


@pytest.mark.parametrize("most", [1, 30, 2**22])
def test_codes_found_in_parts_are_those_found_at_once(most: int, monkeypatch) -> None:
    monkeypatch.setattr(codes, "MAX_SCORES_IN_MEMORY", most)
    torch.manual_seed(0)
    vectors, codebook, bias = torch.randn(41, 5), torch.randn(13, 5), torch.randn(13)
    plain = (vectors[:, None] - codebook[None]).pow(2).sum(-1).argmin(1)
    assert torch.equal(nearest_codes(vectors, codebook), plain)
    scores = vectors @ codebook.t() + bias
    assert torch.equal(largest_logit(vectors, codebook, bias), scores.argmax(1))


def test_gumbel_training_equals_its_one_hot_product_with_its_gradient() -> None:
    quantizer = QUANTIZERS["gumbel"](QuantizerConfig("gumbel", 13, 5, temperature=0.7)).double()
    z = torch.randn(2, 5, 3, 4, dtype=torch.double, requires_grad=True)
    read = [z, *quantizer.parameters()]
    weights = torch.randn(2, 5, 3, 4, dtype=torch.double)
    torch.manual_seed(1)
    choice = F.gumbel_softmax(quantizer.proj(z), tau=0.7, hard=True, dim=1)
    expected = torch.einsum("bkhw,ke->behw", choice, quantizer.embed.weight)
    torch.manual_seed(1)
    found = quantizer(z)
    assert torch.equal(found.indices, choice.argmax(1))
    torch.testing.assert_close(found.z_q, expected)
    torch.testing.assert_close(
        torch.autograd.grad((found.z_q * weights).sum(), read),
        torch.autograd.grad((expected * weights).sum(), read),
    )


def test_bits_are_drawn_to_be_sure_one_by_one_and_even_together() -> None:
    config = QuantizerConfig("lfq", 4, 2, beta=0.0, entropy_weight=1.0)
    quantizer = QUANTIZERS["lfq"](config)
    quantizer.to_code = torch.nn.Identity()
    far = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    losses = {
        "even": quantizer(far[:, :, None, None]).loss,
        "one code": quantizer(far[:1, :, None, None]).loss,
        "unsure": quantizer(torch.zeros(4, 2, 1, 1)).loss,
    }
    two_bits = 2 * torch.tensor(2.0).log()
    torch.testing.assert_close(losses["even"], -two_bits)
    torch.testing.assert_close(losses["one code"], torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses["unsure"], torch.tensor(0.0), atol=1e-5, rtol=0)
    assert quantizer.indices(far[:, :, None, None]).flatten().tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_bits_that_are_sure_have_a_finite_gradient(scale: float) -> None:
    """The loss is that of the entropies of probabilities, even for extreme latents."""
    quantizer = QUANTIZERS["lfq"](QuantizerConfig("lfq", 8, 3, beta=0.0, entropy_weight=1.0))
    quantizer.to_code = torch.nn.Identity()
    z = scale * torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    loss = quantizer(z).loss
    loss.backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()
    shares = (quantizer.INVERSE_TEMPERATURE * z.detach().double()).sigmoid()
    entropy = torch.distributions.Bernoulli(shares).entropy().sum(1).mean()
    together = torch.distributions.Bernoulli(shares.mean((0, 2, 3))).entropy().sum()
    assert loss.item() == pytest.approx(float(entropy - together), abs=1e-4)


def test_a_codebook_behind_a_layer_moves_as_a_whole() -> None:
    quantizer = QUANTIZERS["simvq"](QuantizerConfig("simvq", 30, 12))
    before = quantizer.turn(quantizer.codebook).detach().clone()
    result = quantizer(torch.randn(1, 12, 1, 1))  # one latent, so one code is chosen
    result.loss.backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= parameter.grad
    moved = (quantizer.turn(quantizer.codebook) - before).abs().amax(1) > 0
    assert moved.all() and not quantizer.codebook.requires_grad


def test_beta_weighs_the_commitment_and_not_the_codebook() -> None:
    z = torch.randn(2, 12, 3, 3, requires_grad=True)
    gradients = []
    for beta in (0.25, 0.5):
        torch.manual_seed(0)
        quantizer = QUANTIZERS["vq"](replace(QUANTIZER, kind="vq", beta=beta))
        z.grad = None
        quantizer(z).loss.backward()
        gradients.append((z.grad, quantizer.embedding.weight.grad))
    torch.testing.assert_close(gradients[1][0], 2 * gradients[0][0])
    torch.testing.assert_close(gradients[1][1], gradients[0][1])


def test_a_code_that_nobody_takes_is_revived_from_the_batch() -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS["ema"](QuantizerConfig("ema", 4, 2, decay=0.5, dead_code_threshold=0.2))
    z = torch.randn(1, 2, 6, 6)
    quantizer.start(z)
    lost = torch.tensor([1, 3])
    quantizer.codebook[lost] = 100.0
    quantizer.sums[lost] = 100.0 * quantizer.counts[lost, None]
    for _ in range(5):
        quantizer.update_codebook(z, quantizer.indices(z))
    assert quantizer.codebook.abs().max() <= z.abs().max()
    vectors = z.movedim(1, -1).flatten(0, -2)
    assert (quantizer.codebook[:, None] - vectors).norm(dim=-1).min(1).values.max() < 1.0


def test_a_revived_code_goes_where_the_codebook_errs_most() -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS["ema"](QuantizerConfig("ema", 3, 1, decay=0.9))
    background = torch.zeros(1, 1, 10, 10)
    quantizer.start(background)
    rare = background.clone()
    rare[0, 0, 3, 7] = 5.0
    quantizer.counts[2] = 0.0
    quantizer.update_codebook(rare, quantizer.indices(rare))
    assert quantizer.codebook.flatten()[2].item() == 5.0


@pytest.mark.parametrize(
    ("groups", "channels", "expected"), [(32, 128, 32), (32, 20, 20), (8, 12, 6), (4, 16, 4)]
)
def test_a_norm_has_as_many_groups_as_divide_the_channels(
    groups: int, channels: int, expected: int
) -> None:
    model = VQGAN(VQGANConfig(resolution=8, channels=(channels,), norm_groups=groups))
    assert model.encoder.norm_out.num_groups == expected


def test_the_ema_codebook_settles_on_the_means_of_its_latents() -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS["ema"](QuantizerConfig("ema", 2, 1, decay=0.8))
    z = torch.tensor([1.0, 1.2, 0.8, -2.0, -2.4, -1.6]).view(1, 1, 2, 3)
    quantizer.start(z)
    for _ in range(60):
        quantizer.update_codebook(z, quantizer.indices(z))
    torch.testing.assert_close(
        quantizer.codebook.flatten().sort().values, torch.tensor([-2.0, 1.0]), atol=1e-2, rtol=0
    )


def test_every_index_of_fsq_is_its_own_code() -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS["fsq"](replace(QUANTIZER, kind="fsq"))
    indices = torch.arange(30).view(1, 5, 6)
    digits = indices[..., None] // quantizer.basis % quantizer.levels - quantizer.levels // 2
    assert torch.equal(quantizer._to_indices(digits.movedim(-1, 1).float()), indices)


def test_gumbel_codes_are_drawn_by_their_softmax_from_the_generator() -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS["gumbel"](QuantizerConfig("gumbel", 3, 4))
    z = torch.randn(1, 4, 1, 1).expand(1, 4, 60, 60)
    drawn = [quantizer.sample(z, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    shares = torch.bincount(drawn[0].flatten(), minlength=3) / 3600
    expected = quantizer.proj(z)[0, :, 0, 0].softmax(0)
    torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)


def test_usage_and_perplexity_of_known_counts() -> None:
    assert codebook_usage(torch.tensor([4.0, 4.0, 0.0, 0.0])) == pytest.approx((0.5, 2.0))
    assert codebook_usage(torch.tensor([7.0])) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.encode_indices(torch.rand(1, 3, 15, 16)), "multiples of 4, got 15"),
        (lambda model: model.decode_indices(torch.zeros(1, 7, dtype=torch.long)), "7 indices"),
        (
            lambda model: model.decode_indices(torch.zeros(1, 8, dtype=torch.long), height=3),
            "do not fill 3 rows",
        ),
    ],
)
def test_images_and_indices_that_do_not_fit_are_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(small_vqgan("vq").eval())


@pytest.mark.parametrize(
    ("field", "value"),
    [("resolution", 18), ("channels", ()), ("num_res_blocks", 0)],
)
def test_a_wrong_vqgan_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "vqq"), ("num_codes", 0), ("levels", (1,)), ("decay", 1.0), ("temperature", 0.0)],
)
def test_a_wrong_quantizer_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(QUANTIZER, **{field: value})


def test_fsq_needs_as_many_codes_as_its_levels_give() -> None:
    with pytest.raises(ValueError, match=r"num_codes must be the product of levels \(30\)"):
        replace(QUANTIZER, kind="fsq", num_codes=31)
