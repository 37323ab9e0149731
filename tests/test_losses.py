"""Losses: the reference's numbers and gradients, loss weights and scored labels."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rudolph.models.reference import from_reference
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.sequence.layout import SEGMENTS, SequenceLayout, Vocabulary
from rudolph.training import losses as losses_module
from rudolph.training.losses import (
    REDUCTIONS,
    DecoderLossConfig,
    LabelTotals,
    LearnedWeights,
    ReconstructionLossConfig,
    adaptive_weight,
    compute_losses,
    entry_sums,
    hinge_discriminator_loss,
    label_totals,
    reconstruction_loss,
    reduce_losses,
    segment_losses,
    weighted_mean,
)

CASES = ["rudolph_350m_like", "rudolph_plain_norms", "rudolph_v1_no_specials"]
LEGACY = DecoderLossConfig(first_image_token="legacy")


@pytest.mark.parametrize("case", CASES)
def test_legacy_losses_and_gradients_equal_the_reference(parity, case: str) -> None:
    golden = parity(case)
    io = golden.io
    model = from_reference("rudolph", golden.config, golden.weights).eval()
    for name, weights in {"loss_w_1_7_1": (1, 7, 1), "loss_w_001_1_7": (0.01, 1, 7)}.items():
        config = DecoderLossConfig(*weights, first_image_token="legacy")
        losses = segment_losses(model, io["tokens"], config)
        parts = ("l_text_loss", "image_loss", "r_text_loss")
        for segment, part in zip(SEGMENTS, parts, strict=True):
            torch.testing.assert_close(losses[segment], io[f"loss_part_{part}"], atol=1e-5, rtol=0)
        torch.testing.assert_close(weighted_mean(losses, config.weights), io[name])
    weighted_mean(segment_losses(model, io["tokens"], LEGACY), LEGACY.weights).backward()
    gradients = {"grad_qkv_0": model.layers[0].to_qkv.weight.grad}
    gradients["grad_text_embeddings"] = model.text_embedding.weight.grad
    found = [name for name in gradients if name in io]
    assert found
    for name in found:
        torch.testing.assert_close(gradients[name], io[name], atol=1e-6, rtol=1e-4)


def tiny() -> tuple[MaskedDecoder, torch.Tensor]:
    torch.manual_seed(0)
    config = DecoderConfig(2, 16, 2, layer_masks=("row",), last_layer_mask=None)
    model = MaskedDecoder(config, SequenceLayout(4, 2, 5), Vocabulary(9, 2, 4, 6))
    left = torch.tensor([[2, 5, 3, 0], [2, 3, 0, 0]])
    image = torch.tensor([[0, 5, 1, 2], [3, 3, 4, 0]])
    right = torch.tensor([[2, 7, 8, 3, 0], [0, 0, 0, 0, 0]])
    return model.eval(), torch.cat([left, image, right], dim=1)


def test_losses_are_cross_entropies_of_the_full_logits_at_the_labels() -> None:
    model, tokens = tiny()
    logits = model(tokens)
    text, image = logits[..., :15], logits[..., 15:]
    paddings = torch.tensor([[5, 3, 14], [3, 13, 14]])  # ids 11 to 14 pad positions 0 to 3
    expected = {
        "left_text": F.cross_entropy(text[:, :3].flatten(0, 1), paddings.flatten()),
        "image": F.cross_entropy(image[:, 3:7].flatten(0, 1), tokens[:, 4:8].flatten()),
        "right_text": F.cross_entropy(text[0, 8:11], torch.tensor([7, 8, 3])),
    }
    found = segment_losses(model, tokens, DecoderLossConfig())
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    without = segment_losses(model, tokens, DecoderLossConfig(left_padding=False))
    real = F.cross_entropy(
        torch.stack([text[0, 0], text[0, 1], text[1, 0]]), torch.tensor([5, 3, 3])
    )
    torch.testing.assert_close(without["left_text"], real)


def test_the_first_image_token_is_trained_in_the_image_vocabulary_unless_legacy() -> None:
    model, tokens = tiny()
    for config, is_trained in ((DecoderLossConfig(0, 1, 0), True), (LEGACY, False)):
        model.zero_grad()
        hidden = model.hidden(tokens)
        hidden.retain_grad()
        model.hidden = lambda tokens, hidden=hidden: hidden  # type: ignore[method-assign]
        weighted_mean(
            {"image": segment_losses(model, tokens, config)["image"]}, {"image": 1}
        ).backward()
        assert (hidden.grad[:, 3].abs().sum() > 0) == is_trained
        del model.hidden


@pytest.mark.parametrize("segment", SEGMENTS)
def test_a_segment_of_weight_zero_gives_no_gradient_and_costs_nothing(segment: str) -> None:
    model, tokens = tiny()
    config = replace(DecoderLossConfig(), **{f"{segment}_weight": 0.0})
    losses = segment_losses(model, tokens, config)
    assert segment not in losses and len(losses) == 2
    weighted_mean(losses, config.weights).backward()
    gradient = model.to_logits.weight.grad
    if segment == "image":
        assert gradient[15:].abs().sum() == 0
    else:
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_parts_of_the_labels_give_the_losses_and_gradients_of_all_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    found = []
    for bound in (1000, at_once):
        model, tokens = tiny()
        sizes = model.vocabulary.text_size, model.vocabulary.image_size
        monkeypatch.setattr(
            "rudolph.models.rudolph.scoring.MAX_LOGITS_IN_MEMORY", bound * min(sizes)
        )
        rows: list[int] = []
        for number, head in enumerate(heads := model.to_logits.heads()):
            heads[number] = lambda hidden, head=head, rows=rows: (
                rows.append(len(hidden)) or head(hidden)
            )
        model.to_logits.heads = lambda heads=heads: heads
        config = DecoderLossConfig(label_smoothing=0.1)
        losses = segment_losses(model, tokens, config)
        weighted_mean(losses, config.weights).backward()
        assert max(rows) <= bound
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1])


def test_only_scored_examples_count() -> None:
    model, tokens = tiny()
    scored = {"image": torch.tensor([True, False]), "right_text": torch.tensor([False, False])}
    losses = segment_losses(model, tokens, DecoderLossConfig(), scored=scored)
    alone = segment_losses(model, tokens[:1], DecoderLossConfig())
    torch.testing.assert_close(losses["image"], alone["image"])
    assert "right_text" not in losses


def test_an_all_padding_right_text_is_no_loss_and_not_nan() -> None:
    model, tokens = tiny()
    losses = segment_losses(model, tokens[1:], DecoderLossConfig())
    assert set(losses) == {"left_text", "image"}
    assert torch.isfinite(weighted_mean(losses, DecoderLossConfig().weights))


def test_tokens_that_end_inside_a_segment_are_refused() -> None:
    model, tokens = tiny()
    for length in (4, 8, 13):
        segment_losses(model, tokens[:, :length], DecoderLossConfig())
    with pytest.raises(ValueError, match="4, 8 or 13"):
        segment_losses(model, tokens[:, :10], DecoderLossConfig())


def test_no_label_at_all_is_told() -> None:
    with pytest.raises(ValueError, match="no segment"):
        weighted_mean({}, DecoderLossConfig().weights)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_weight": -1},
        {"left_text_weight": 0, "image_weight": 0, "right_text_weight": 0},
        {"first_image_token": "fixed"},
        {"label_smoothing": 1.0},
    ],
)
def test_a_wrong_loss_weight_is_told(fields: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(DecoderLossConfig(), **fields)


def test_reconstruction_and_hinge_losses_worked_by_hand() -> None:
    images, decoded = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    config = ReconstructionLossConfig(l1_weight=2.0, l2_weight=4.0)
    assert reconstruction_loss(decoded, images, config).item() == pytest.approx(2.0)
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))


def test_the_adaptive_weight_makes_both_gradients_equally_long() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    first, second = (weight.sin() * 5).sum(), (weight**3).sum()
    ratio = adaptive_weight(first, second, weight)
    gradients = [torch.autograd.grad(loss, weight)[0].norm() for loss in (first, second)]
    torch.testing.assert_close(ratio * gradients[1], gradients[0], rtol=1e-3, atol=0)


def mixture() -> tuple[MaskedDecoder, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a decoder, five examples of three mixture rows, their rows and their weights."""
    torch.manual_seed(1)
    model = MaskedDecoder(
        DecoderConfig(2, 24, 3), SequenceLayout(5, 2, 6), Vocabulary(20, 3, 5, 9)
    )
    model.eval()
    tokens = torch.randint(4, 9, (5, 15))
    tokens[1, 12:] = tokens[4, 13:] = 0
    sources = torch.tensor([0, 2, 1, 0, 2])
    weights = torch.tensor([[1.0, 7.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.01, 7.0]])[sources]
    return model, tokens, sources, weights


def scored_by(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: weights[:, at] > 0 for at, name in enumerate(SEGMENTS)}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_several_tasks_is_averaged_as_it_is_said(reduction: str) -> None:
    model, tokens, sources, weights = mixture()
    config = DecoderLossConfig(reduction=reduction)
    found = compute_losses(model, tokens, config, scored=scored_by(weights))
    loss = reduce_losses(found, config, weights=weights, sources=sources)
    # The sum and number of losses for each segment of each example, computed alone.
    alone = []
    for row in range(5):
        own = compute_losses(
            model, tokens[row : row + 1], config, scored=scored_by(weights[row : row + 1])
        )
        alone.append({name: (each.losses.sum(), len(each.losses)) for name, each in own.items()})
    if reduction == "token":
        total = sum(
            weights[row, SEGMENTS.index(name)] * each[0]
            for row in range(5)
            for name, each in alone[row].items()
        )
        count = sum(
            weights[row, SEGMENTS.index(name)] * each[1]
            for row in range(5)
            for name, each in alone[row].items()
        )
        expected = total / count
    else:
        groups = [range(5)] if reduction == "batch" else [[0, 3], [2], [1, 4]]
        expected = torch.tensor(0.0)
        for rows in groups:
            above, below = 0.0, 0.0
            for at, name in enumerate(SEGMENTS):
                own = [alone[row][name] for row in rows if name in alone[row]]
                weight = config.weights[name] if reduction == "batch" else weights[rows[0], at]
                if own:
                    above += weight * sum(part[0] for part in own) / sum(part[1] for part in own)
                    below += weight
            expected = expected + above / below * len(rows) / 5
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(each.grad is not None for each in model.to_logits.parameters())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 1, 1, 1), (4, 1)], ids=str)
def test_losses_of_micro_batches_add_up_to_that_of_the_whole_batch(
    reduction: str, sizes: tuple[int, ...]
) -> None:
    model, tokens, sources, weights = mixture()
    config = DecoderLossConfig(reduction=reduction)

    def loss_of(rows: slice, totals: LabelTotals | None = None) -> torch.Tensor:
        found = compute_losses(model, tokens[rows], config, scored=scored_by(weights[rows]))
        return reduce_losses(
            found, config, weights=weights[rows], sources=sources[rows], totals=totals
        )

    whole = loss_of(slice(None))
    whole.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    found = compute_losses(model, tokens, config, scored=scored_by(weights))
    rows = {name: segment.rows for name, segment in found.items()}
    totals = label_totals(rows, weights=weights, sources=sources, num_sources=3)
    total, first = 0.0, 0
    for size in sizes:
        share = loss_of(slice(first, first + size), totals)
        share.backward()
        total, first = total + share.item(), first + size
    assert total == pytest.approx(whole.item(), rel=1e-6)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("leading_bos", [False, True])
@pytest.mark.parametrize("whole", [(), (1, 4), (0, 1, 2, 3, 4)], ids=str)
def test_skipped_right_texts_change_no_loss_and_no_gradient(
    whole: tuple[int, ...], leading_bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples without a right text pass through the layers without its positions."""
    torch.manual_seed(5)
    model = MaskedDecoder(
        DecoderConfig(2, 24, 3, leading_bos=leading_bos),
        SequenceLayout(5, 2, 6),
        Vocabulary(20, 3, 5, 9),
    ).eval()
    tokens = torch.randint(4, 9, (5, 15))
    tokens[[row for row in range(5) if row not in whole], 9:] = 0
    lengths, gradients = [], []

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        found = segment_losses(model, tokens, DecoderLossConfig(softmax="segment"))
        torch.stack(list(found.values())).sum().backward()
        gradients.append(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        )
        return found

    run_layers = model.run_layers
    monkeypatch.setattr(
        model, "run_layers", lambda t, cache=None: (lengths.append(t.shape), run_layers(t))[1]
    )
    skipped = run()
    shapes = [torch.Size([5 - len(whole), 9]), torch.Size([len(whole), 15])]
    assert lengths == [shape for shape in shapes if shape[0]]
    monkeypatch.setattr(
        losses_module, "scored_hidden", lambda model, inputs, labels: model.hidden(inputs)
    )
    torch.testing.assert_close(run(), skipped)
    torch.testing.assert_close(*gradients)


def test_losses_of_rows_of_a_mixture_are_those_of_their_examples() -> None:
    model, tokens, sources, weights = mixture()
    config = DecoderLossConfig(reduction="task")
    found = compute_losses(model, tokens, config, scored=scored_by(weights))
    rows = {name: segment.rows for name, segment in found.items()}
    totals = label_totals(rows, weights=weights, sources=sources, num_sources=4)
    counts, sums = totals.counts, entry_sums(found, sources, 4)
    assert totals.examples.tolist() == [2, 1, 2, 0]
    assert counts[3].tolist() == [0, 0, 0] and sums[3].tolist() == [0, 0, 0]
    for row in range(3):
        own = tokens[sources == row]
        alone = segment_losses(model, own, config, scored=scored_by(weights[sources == row]))
        for at, name in enumerate(SEGMENTS):
            assert (counts[row, at] > 0) == (name in alone)
            if name in alone:
                mean = sums[row, at] / counts[row, at]
                torch.testing.assert_close(mean.float(), alone[name])
                weight = totals.weights[row, at] / counts[row, at]
                torch.testing.assert_close(weight.float(), weights[sources == row][0, at])


def test_a_joint_softmax_is_over_all_ids_and_validation_over_those_of_the_segment() -> None:
    model, tokens = tiny()
    config = DecoderLossConfig(softmax="joint", z_loss_weight=0.01, label_smoothing=0.1)
    logits = model(tokens)[:, 3:7].flatten(0, 1)
    labels = tokens[:, 4:8].flatten() + 15
    cross_entropy = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    expected = (cross_entropy + 0.01 * logits.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(segment_losses(model, tokens, config)["image"], expected)
    plain = segment_losses(model, tokens, config.for_validation)
    for name, value in segment_losses(model, tokens, DecoderLossConfig()).items():
        torch.testing.assert_close(plain[name], value)
    # The image's joint softmax includes text ids, so they get a gradient from it.
    model.zero_grad()
    segment_losses(model, tokens, DecoderLossConfig(softmax="joint"))["image"].backward()
    assert model.to_logits.bias.grad[:15].abs().min() > 0


def test_learned_weights_settle_where_every_segment_counts_alike() -> None:
    losses = {"left_text": torch.tensor(2.0), "right_text": torch.tensor(0.5)}
    learned = LearnedWeights()
    torch.testing.assert_close(learned(losses), torch.tensor(2.5))
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        learned(losses).backward()
        optimizer.step()
    variances = learned.log_variances.exp()
    # Equation 10 is minimal when each variance equals its loss; unscored segments keep theirs.
    torch.testing.assert_close(variances, torch.tensor([2.0, 1.0, 0.5]), atol=1e-3, rtol=0)
    shares = torch.tensor(list(learned.weights.values()))
    torch.testing.assert_close(shares, (1 / variances) / (1 / variances).sum())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reduction": "mean"}, "reduction must be one of batch, task, token"),
        ({"softmax": "both"}, "softmax must be one of segment, joint, got 'both'"),
        ({"weighting": "learned", "reduction": "task"}, "reduction must be batch where"),
        ({"z_loss_weight": -1}, "z_loss_weight must be at least 0, got -1"),
        ({"task_weights": {"vqa": (1, 1, 1)}}, "task_weights: expected tasks of"),
        ({"task_weights": {"text_to_image": (0, 0, 0)}}, "and one above 0"),
    ],
)
def test_a_wrong_way_to_weigh_tasks_is_told(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DecoderLossConfig(**fields)
