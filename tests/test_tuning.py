"""Fine-tuning: other layouts load old weights, frozen parts stay, memory is known in advance."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rudolph.models.layers.lora import merge_low_rank
from rudolph.models.rudolph.adapt import adapt
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.training.losses import DecoderLossConfig, segment_losses, weighted_mean
from rudolph.training.memory import count_activation_bytes, training_memory
from rudolph.training.optim import OptimConfig, build_optimizers, optimizer_bytes
from rudolph.training.tuning import FREEZABLE_PARTS, TuningConfig, apply_tuning

SMALL = DecoderConfig(4, 16, 2, layer_masks=("row", "column"), last_layer_mask="conv(3)")
LAYOUT = SequenceLayout(5, 3, 6)
VOCABULARY = Vocabulary(20, 3, 5, 11, 2)


def decoder(
    layout: SequenceLayout = LAYOUT, vocabulary: Vocabulary = VOCABULARY, seed: int = 0
) -> MaskedDecoder:
    torch.manual_seed(seed)
    return MaskedDecoder(SMALL, layout, vocabulary)


def tokens_of(model: MaskedDecoder, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    left, image, right = model.layout.segment_lengths
    parts = [
        torch.randint(1, high, (batch, length), generator=generator)
        for high, length in ((20, left), (11, image), (20, right))
    ]
    return torch.cat(parts, dim=1)


def train(model: MaskedDecoder, num_steps: int = 3, **optim: object) -> None:
    config = OptimConfig(num_steps=num_steps, learning_rate=0.01, warmup_steps=0, **optim)
    optimizers = build_optimizers(model.train(), config)
    for _ in range(num_steps):
        losses = segment_losses(model, tokens_of(model), DecoderLossConfig())
        weighted_mean(losses, DecoderLossConfig().weights).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def changed(model: MaskedDecoder, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.equal(before[name])}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("part", [part for part in FREEZABLE_PARTS if part != "all"])
def test_a_frozen_part_stays_and_all_else_moves(part: str, optimizer: str) -> None:
    model = decoder()
    before = values(model)
    apply_tuning(model, TuningConfig(frozen=(part,)))
    train(model, optimizer=optimizer)
    moved = changed(model, before)
    still = set(before) - moved
    words = {
        "embeddings": ("embedding", "position"),
        "attention": ("to_qkv", "to_out"),
        "mlp": ("mlp_in.", "mlp_out."),
        "norms": ("norm",),
        "head": ("to_logits",),
        "layers": ("layers.",),
    }[part]
    assert still == {name for name in before if any(word in name for word in words)}


def test_a_range_of_layers_freezes_them_alone() -> None:
    model = decoder()
    before = values(model)
    apply_tuning(model, TuningConfig(frozen=("layers(1-2)", "mlp(3-3)")))
    train(model)
    still = set(before) - changed(model, before)
    assert still == {
        name
        for name in before
        if name.startswith(("layers.1.", "layers.2.", "layers.3.mlp_in.", "layers.3.mlp_out."))
    }


def test_low_rank_updates_train_few_parameters_and_merge_into_the_same_model() -> None:
    model, tokens = decoder(), tokens_of(decoder())
    before, names = model.eval()(tokens), list(model.state_dict())
    weights = values(model)
    apply_tuning(
        model, TuningConfig(("all",), lora_rank=2, lora_target_modules=("attention", "head"))
    )
    torch.testing.assert_close(model(tokens), before)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    layers = 4 * 2 * ((16 + 48) + (16 + 16))
    assert trained == layers + 2 * (16 + VOCABULARY.size)
    train(model, optimizer="muon")
    after = model.eval()(tokens)
    merge_low_rank(model)
    torch.testing.assert_close(model(tokens), after)
    assert (after - before).abs().max() > 1e-3
    assert sorted(model.state_dict()) == sorted(names)
    for name in changed(model, weights):
        assert name.endswith("weight") and ("to_qkv" in name or "to_out" in name or "lo" in name)
        update = model.get_parameter(name) - weights[name]
        assert torch.linalg.matrix_rank(update, rtol=1e-4) <= 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"frozen": ("attn",)}, "frozen: expected one of all, embeddings"),
        ({"frozen": ("head(0-1)",)}, "expected a range, first to last, of"),
        ({"frozen": ("mlp(2-1)",)}, "expected a range, first to last, of"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha must be above 0"),
    ],
)
def test_a_wrong_part_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TuningConfig(**config)


@pytest.mark.parametrize(
    ("frozen", "words"),
    [("mlp(0-4)", "expected layers 0 to 3"), ("all", "expected a part to train")],
)
def test_what_does_not_fit_the_model_is_named(frozen: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        apply_tuning(decoder(), TuningConfig(frozen=(frozen,)))


def test_the_same_layout_and_vocabulary_take_the_weights_bit_for_bit() -> None:
    source, target = decoder(), decoder(seed=1)
    assert adapt(source, target) == []
    assert all(value.equal(target.state_dict()[key]) for key, value in source.state_dict().items())


def test_new_ids_leave_old_ones_as_they_were() -> None:
    source = decoder().eval()
    larger = Vocabulary(24, 6, 5, 13, 4)
    target = decoder(vocabulary=larger, seed=1)
    fresh = {key: value.clone() for key, value in target.state_dict().items()}
    notes = adapt(source, target.eval())
    assert [note.partition(":")[0] for note in notes] == [
        "BPE ids 20 -> 24",
        "text specials 3 -> 6",
        "codes 11 -> 13",
        "image specials 2 -> 4",
    ]
    places = [*range(20), *range(24, 27), *range(30, 35), *range(35, 46), *range(48, 50)]
    logits = target(tokens_of(target))[..., places]
    torch.testing.assert_close(logits, source(tokens_of(source)))
    rest = sorted(set(range(larger.size)) - set(places))
    for name in ("to_logits.weight", "to_logits.bias"):
        assert target.state_dict()[name][rest].equal(fresh[name][rest])


def test_shorter_texts_lose_their_last_positions_and_the_rest_is_the_same() -> None:
    source, layout = decoder().eval(), SequenceLayout(5, 3, 3)
    target = decoder(layout, seed=1).eval()
    assert adapt(source, target) == ["right text 6 -> 3: positions cut"]
    tokens = tokens_of(source)[:, : layout.length]
    torch.testing.assert_close(target(tokens), source(tokens))


def test_longer_texts_and_larger_images_have_positions_between_the_old_ones() -> None:
    source = decoder()
    target = decoder(SequenceLayout(9, 5, 6), replace(VOCABULARY, num_left_paddings=9), seed=1)
    notes = adapt(source, target)
    assert [note.partition(":")[0] for note in notes] == [
        "left text 5 -> 9",
        "image rows 3 -> 5",
        "image columns 3 -> 5",
    ]
    for name, step in (("left_position", 2), ("row_position", 2), ("column_position", 2)):
        old, new = (model.get_submodule(name).weight for model in (source, target))
        old, new = (old[:-1], new[:-1]) if name == "left_position" else (old, new)
        torch.testing.assert_close(new[::step], old)
        torch.testing.assert_close(new[1::step], (old[:-1] + old[1:]) / 2)


@pytest.mark.parametrize("length", [3, 9])
def test_a_leading_bos_keeps_its_position_when_the_left_text_is_resized(length: int) -> None:
    config = replace(SMALL, leading_bos=True)
    source = MaskedDecoder(config, replace(LAYOUT, right_text_length=0), VOCABULARY)
    vocabulary = replace(VOCABULARY, num_left_paddings=length)
    target = MaskedDecoder(config, SequenceLayout(length, 3, 0), vocabulary)
    notes = adapt(source, target)
    kind = "cut" if length == 3 else "interpolated"
    assert notes == [f"left text 5 -> {length}: positions {kind}"]
    old, new = source.left_position.weight, target.left_position.weight
    torch.testing.assert_close(new[0], old[0])
    step = 1 if length == 3 else 2
    torch.testing.assert_close(new[1::step], old[1:][: len(new[1::step])])


def test_weights_of_another_shape_are_refused_by_the_settings_name() -> None:
    other = MaskedDecoder(replace(SMALL, num_layers=3), LAYOUT, VOCABULARY)
    with pytest.raises(ValueError, match=r"model\.num_layers must be 4, .* got 3"):
        adapt(decoder(), other)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for has_checkpointing in (False, True):
        model = decoder().train()
        model.has_checkpointing = has_checkpointing
        torch.manual_seed(7)  # for dropout
        losses = segment_losses(model, tokens_of(model), DecoderLossConfig())
        weighted_mean(losses, DecoderLossConfig().weights).backward()
        gradients.append([value.grad for value in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_is_as_large_as_was_said(optimizer: str) -> None:
    model = decoder()
    apply_tuning(model, TuningConfig(frozen=("embeddings", "mlp")))
    config = OptimConfig(optimizer=optimizer)
    optimizers = build_optimizers(model, config)
    losses = segment_losses(model, tokens_of(model), DecoderLossConfig())
    weighted_mean(losses, DecoderLossConfig().weights).backward()
    held = 0
    for each in optimizers:
        each.step()
        held += sum(
            value.numel() * value.element_size()
            for state in each.state.values()
            for name, value in state.items()
            if name != "step"
        )
    assert held == optimizer_bytes(model, config)


def test_expected_activations_are_those_that_a_real_pass_keeps() -> None:
    losses = DecoderLossConfig()
    config = replace(SMALL, attention_dropout=0.0, output_dropout=0.0)
    real = MaskedDecoder(config, LAYOUT, VOCABULARY)
    with torch.device("meta"):
        empty = MaskedDecoder(config, LAYOUT, VOCABULARY)
    own = {value.untyped_storage().data_ptr() for value in real.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean = segment_losses(real, tokens_of(real, 8), losses)
        weighted_mean(mean, losses.weights)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert count_activation_bytes(empty, losses, 8) == pytest.approx(measured, rel=0.35)
    with_layers = count_activation_bytes(empty, losses, 8)
    empty.has_checkpointing = True
    assert count_activation_bytes(empty.train(), losses, 8) < with_layers / 2


def test_the_largest_model_is_counted_without_being_allocated() -> None:
    with torch.device("meta"):
        model = MaskedDecoder(
            DecoderConfig(32, 2560, 32),
            SequenceLayout(384, 24, 128),
            Vocabulary(16384, 1024, 384, 8192, 1024),
        )
    need = training_memory(model, DecoderLossConfig(), OptimConfig(), micro_batch_size=1)
    assert need.total == need.trainable == 2_657_731_968
    assert need.weights == need.gradients == need.optimizer // 2 == 4 * need.total
    assert need.activations > 10**9
