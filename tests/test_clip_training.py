"""Training of a CLIP: losses in plain loops, a locked tower, repeated captions, any devices."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import NUM_PAIRS, config_for, scenes
from tiny_run import quiet, write
from torch import Tensor
from torch.nn import functional as F

from rudolph.config.experiment_file import load_experiment
from rudolph.data.loader import Streams
from rudolph.data.splits import Split
from rudolph.data.text_image import TextImageExamples, caption_ids
from rudolph.generation.clip_ranking import PLAIN_TEMPLATES, ClipRanker, retrieval_recalls
from rudolph.models.reference import from_reference, to_reference
from rudolph.models.vision.clip import CLIP
from rudolph.models.weights import load_exactly
from rudolph.runs.execution import Execution, Folders, Hardware, NullRecorder
from rudolph.runs.trainer import averaging, fit, make_trainer
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.clip import CLIPTraining
from rudolph.training.clip_losses import (
    CLIP_LOSSES,
    CLIPLossConfig,
    sigmoid_loss,
    softmax_loss,
)
from rudolph.training.optim import OptimConfig

OPTIM = OptimConfig(num_steps=3, global_batch_size=6, warmup_steps=0, weight_decay=0.3)
CPU = Hardware(accelerator="cpu", precision="32-true")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Tokenizer]:
    return scenes(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def split(opened: tuple[Split, Tokenizer]) -> Split:
    return opened[0]


@pytest.fixture(scope="module")
def tokenizer(opened: tuple[Split, Tokenizer]) -> Tokenizer:
    return opened[1]


def training(
    tokenizer: Tokenizer, optim: OptimConfig = OPTIM, **losses: Any
) -> tuple[CLIP, CLIPTraining]:
    torch.manual_seed(5)
    has_logit_bias = losses.get("kind") == "sigmoid"
    model = CLIP(config_for(tokenizer, has_logit_bias=has_logit_bias))
    return model, CLIPTraining(model, CLIPLossConfig(**losses), optim)


def train(
    module: CLIPTraining, examples: TextImageExamples, hardware: Hardware = CPU
) -> dict[str, float]:
    """Train to the last step and return the logged metrics."""
    streams = Streams(
        examples.batch,
        examples.whole,
        global_batch_size=module.optim.global_batch_size,
        micro_batch_size=hardware.batches(module.optim)[0],
        num_steps=module.optim.num_steps,
        num_validation=examples.num_whole,
    )
    trainer = make_trainer(hardware, logger=False, callbacks=averaging(module.optim))
    trainer.fit(module, streams)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def units(number: int, size: int, seed: int) -> Tensor:
    drawn = torch.randn(number, size, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=1)


# --- the losses ----------------------------------------------------------------------------------

CAPTIONS = [3, 1, 3, 0, 1, 3, 2]


def softmax_by_hand(logits: list[list[float]], captions: list[int]) -> float:
    """Compute the softmax loss of each image and caption against different captions only."""
    pairs, total = range(len(captions)), 0.0
    for own in pairs:
        compared = [own] + [other for other in pairs if captions[other] != captions[own]]
        by_image = sum(math.exp(logits[own][other]) for other in compared)
        by_text = sum(math.exp(logits[other][own]) for other in compared)
        total += math.log(by_image) + math.log(by_text) - 2 * logits[own][own]
    return total / (2 * len(captions))


def sigmoid_by_hand(logits: list[list[float]], captions: list[int]) -> float:
    """Compute the sigmoid loss of every combination of image and caption."""
    total = 0.0
    for row, image in zip(logits, captions, strict=True):
        for logit, text in zip(row, captions, strict=True):
            total += math.log(1 + math.exp(-logit if image == text else logit))
    return total / len(captions)


BY_HAND = {"softmax": softmax_by_hand, "sigmoid": sigmoid_by_hand}


def matches(captions: list[int]) -> Tensor:
    return torch.tensor(captions)[:, None] == torch.tensor(captions)


@pytest.mark.parametrize("kind", CLIP_LOSSES)
@pytest.mark.parametrize("captions", [CAPTIONS, list(range(7)), [0] * 7, [0]])
def test_a_loss_is_that_of_a_plain_loop(kind: str, captions: list[int]) -> None:
    logits = 3 * torch.randn(len(captions), len(captions), dtype=torch.float64)
    found = CLIP_LOSSES[kind](logits, matches(captions))
    assert found.item() == pytest.approx(BY_HAND[kind](logits.tolist(), captions))


def test_with_different_captions_the_softmax_is_clips_own() -> None:
    images, texts = units(32, 64, seed=0), units(32, 64, seed=1)
    logits = images @ texts.t() / 0.07
    labels = torch.arange(32)
    both = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
    found = softmax_loss(logits, torch.eye(32, dtype=torch.bool))
    torch.testing.assert_close(found, both / 2)
    # Random cosines cost more than the ln 32 of equal ones.
    assert math.log(32) < found.item() < 6


def test_the_sigmoid_loss_begins_near_ten_and_without_its_bias_far_above() -> None:
    is_match = torch.eye(32, dtype=torch.bool)
    cosines = units(32, 64, seed=0) @ units(32, 64, seed=1).t()
    assert sigmoid_loss(10 * cosines - 10, is_match).item() == pytest.approx(9.8, abs=0.5)
    assert sigmoid_loss(10 * cosines, is_match).item() > 20


@pytest.mark.parametrize("kind", CLIP_LOSSES)
def test_pairs_that_share_a_caption_do_not_push_each_other_away(kind: str) -> None:
    logits = torch.randn(7, 7, requires_grad=True)
    CLIP_LOSSES[kind](logits, matches(CAPTIONS)).backward()
    found = logits.grad[matches(CAPTIONS)]
    # A negative gradient raises the logit; the softmax ignores matches off the diagonal.
    assert (found <= 0).all() and (logits.grad[~matches(CAPTIONS)] > 0).all()
    off = matches(CAPTIONS) & ~torch.eye(7, dtype=torch.bool)
    assert bool((logits.grad[off] == 0).all()) == (kind == "softmax")


def test_in_half_precision_logits_are_as_exact_as_in_full(tokenizer: Tokenizer) -> None:
    _, module = training(tokenizer, initial_scale=100.0)
    images, texts, captions = units(9, 24, seed=0), units(9, 24, seed=1), torch.arange(9)
    expected = module.loss(images, texts, captions, captions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.loss(images, texts, captions, captions), expected)
        rounded = softmax_loss(module.model.logits(images, texts).float(), matches(list(range(9))))
    assert not torch.equal(rounded, expected)


# --- the model -----------------------------------------------------------------------------------


def test_the_text_tower_begins_as_openais(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = CLIP(config_for(tokenizer, transformer_width=96, transformer_layers=3))
    spreads = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": 96**-0.5,
        "visual.proj": 32**-0.5,
        "visual.positional_embedding": 32**-0.5,
    }
    for layer in range(3):
        block = f"transformer.resblocks.{layer}"
        spreads |= {
            f"{block}.attn.in_proj_weight": 96**-0.5,
            f"{block}.attn.out_proj.weight": 96**-0.5 * 6**-0.5,
            f"{block}.mlp.c_fc.weight": 192**-0.5,
            f"{block}.mlp.c_proj.weight": 96**-0.5 * 6**-0.5,
        }
    for name, std in spreads.items():
        values = model.get_parameter(name).detach()
        assert values.std().item() == pytest.approx(std, rel=4 * (2 * values.numel()) ** -0.5)
        assert abs(values.mean().item()) < 5 * std * values.numel() ** -0.5
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)


def test_only_a_clip_that_asks_for_a_bias_has_one(tokenizer: Tokenizer) -> None:
    plain, biased = (CLIP(config_for(tokenizer, has_logit_bias=each)) for each in (False, True))
    assert set(biased.state_dict()) - set(plain.state_dict()) == {"logit_bias"}
    assert biased.logit_scale.item() == pytest.approx(math.log(10))
    images, texts = units(3, 24, seed=0), units(4, 24, seed=1)
    torch.testing.assert_close(biased.logits(images, texts), 10 * images @ texts.t() - 10)
    assert "has_logit_bias" not in to_reference(plain).config
    again = from_reference(*to_reference(biased))
    assert again.config == biased.config and again.logit_bias.item() == -10


# --- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "first", "sign", "last"),
    [
        ("softmax", 100.0, 1, 100.0),
        ("softmax", 1.0, -1, 1.0),
        ("softmax", 50.0, 1, 50 * math.e**0.1),
        ("sigmoid", 100.0, 1, 100 * math.e**0.1),
    ],
)
def test_the_scale_of_the_softmax_stays_in_its_bounds(
    split, tokenizer, monkeypatch, kind: str, first: float, sign: int, last: float
) -> None:
    # A loss that pushes all logits up or down, whatever they are.
    monkeypatch.setitem(CLIP_LOSSES, kind, lambda logits, is_match: -sign * logits.pow(2).mean())
    optim = replace(OPTIM, num_steps=1, learning_rate=0.1)
    model, module = training(tokenizer, optim, kind=kind, initial_scale=first)
    if kind == "sigmoid":
        model.logit_bias.data.zero_()
    train(module, TextImageExamples(split, tokenizer, model.config, seed=0))
    assert model.logit_scale.exp().item() == pytest.approx(last, rel=1e-4)


def tower_of(name: str) -> str:
    if name.startswith("visual."):
        return "image"
    return "none" if name.startswith("logit_") else "text"


@pytest.mark.parametrize("frozen", ["none", "image", "text"])
def test_a_frozen_tower_stays_bit_equal_and_the_gradient_reaches_the_other(
    split, tokenizer, frozen: str
) -> None:
    optim = replace(OPTIM, ema_decay=0.5)
    model, module = training(tokenizer, optim, frozen=frozen)
    examples = TextImageExamples(split, tokenizer, model.config, seed=0)
    batch = examples.batch(range(6))
    module.loss(*module.features(batch), batch.image_ids, batch.captions).backward()
    for name, parameter in model.named_parameters():
        is_frozen = frozen == tower_of(name) != "none"
        assert (parameter.grad is None) == is_frozen, name
        assert is_frozen or parameter.grad.abs().sum() > 0, name
    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    train(module, examples)
    for name, value in model.state_dict().items():
        is_frozen = frozen == tower_of(name) != "none"
        assert torch.equal(value, before[name]) == is_frozen, name


def test_gains_biases_and_the_scale_do_not_decay(tokenizer: Tokenizer) -> None:
    model, module = training(tokenizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizers, _ = module.configure_optimizers()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decayed = {
        names[each] for group in groups if group["weight_decay"] for each in group["params"]
    }
    assert {"text_projection", "visual.proj", "visual.conv1.weight"} <= decayed
    assert not decayed & {"logit_scale", "token_embedding.weight", "visual.class_embedding"}
    assert not [name for name in decayed if "bias" in name or "ln_" in name]


@pytest.mark.parametrize(("kind", "num_steps"), [("softmax", 80), ("sigmoid", 180)])
def test_a_few_pairs_are_learned_by_fit_and_each_finds_its_own(
    split, tokenizer, tmp_path: Path, kind: str, num_steps: int
) -> None:
    optim = OptimConfig(
        num_steps=num_steps,
        global_batch_size=16,
        learning_rate=0.003,
        warmup_steps=5,
        validate_every=num_steps,
    )
    model, module = training(tokenizer, optim, kind=kind)
    examples = TextImageExamples(split, tokenizer, model.config, seed=1)
    chosen = list(range(16))
    run, folders = load_experiment(write(tmp_path)).runs[0], Folders(tmp_path, tmp_path / "runs")
    execution = Execution(run, tmp_path, folders, CPU, NullRecorder(), quiet)
    weights = tmp_path / "clip" / "weights.safetensors"
    weights.parent.mkdir()
    fit(
        execution,
        module,
        optim,
        examples=(lambda numbers: examples.whole(chosen), examples.whole, len(chosen)),
        stage="clip",
        advance=lambda done, total, note: None,
        weights=weights,
        digest="these",
        seed=0,
    )
    curves = (tmp_path / "clip" / "curves.jsonl").read_text()
    assert '"clip/val/image_to_text/recall_at_1": 1.0' in curves
    assert '"clip/val/text_to_image/recall_at_1": 1.0' in curves
    again = CLIP(model.config)
    load_exactly(again, load_file(weights), family="clip")
    ranker = ClipRanker(again, tokenizer, templates=PLAIN_TEMPLATES)
    captions = [split.captions[index] for index in chosen]
    recalls = retrieval_recalls(
        ranker.image_features(split.image_batch(chosen)),
        ranker.text_features(captions),
        torch.from_numpy(split.clusters(chosen)),
        torch.from_numpy(caption_ids(captions)),
    )
    assert set(recalls.values()) == {1.0}


class Recorded(CLIPTraining):
    """A module that stores the last step's gradients, whose scale AdamW would remove."""

    path: Path

    def on_after_backward(self) -> None:
        found = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        torch.save(found, self.path.with_suffix(f".{self.global_rank}"))


def test_two_processes_have_the_gradients_of_one_with_their_whole_batch(
    split, tokenizer, tmp_path: Path
) -> None:
    gradients, logged = [], []
    for hardware in (CPU, replace(CPU, devices=2, strategy="ddp_fork")):
        model, _ = training(tokenizer)
        module = Recorded(model, CLIPLossConfig(), OPTIM)
        module.path = tmp_path / f"of_{hardware.devices}"
        examples = TextImageExamples(split, tokenizer, model.config, seed=0)
        logged.append(train(module, examples, hardware))
        gradients += [
            torch.load(module.path.with_suffix(f".{rank}")) for rank in range(hardware.devices)
        ]
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], atol=1e-4, rtol=1e-2)


def test_validation_is_of_all_pairs_whatever_the_batches(split, tokenizer) -> None:
    model, module = training(tokenizer)
    examples = TextImageExamples(split, tokenizer, model.config, seed=0)
    found = train(module, examples)
    with torch.no_grad():
        batch = examples.whole(range(NUM_PAIRS))
        images, texts = module.features(batch)
        groups = [slice(first, first + 6) for first in range(0, 66, 6)]
        numbers = batch.image_ids, batch.captions
        losses = [
            module.loss(images[at], texts[at], *(each[at] for each in numbers)) for at in groups
        ]
    assert found["val/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    expected = retrieval_recalls(images, texts, *numbers)
    assert {name: found[f"val/{name}"] for name in expected} == pytest.approx(expected)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "hinge"},
        {"initial_scale": 0.0},
        {"initial_scale": 101.0},
        {"initial_scale": math.inf, "kind": "sigmoid"},
        {"initial_bias": -10.0},
        {"frozen": "both"},
    ],
)
def test_a_wrong_field_is_told(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} must be"):
        CLIPLossConfig(**fields)


def test_what_does_not_fit_together_is_told(split, tokenizer) -> None:
    biased = CLIP(config_for(tokenizer, has_logit_bias=True))
    for model, kind, words in (
        (biased, "softmax", "has_logit_bias must be false for the softmax loss, got true"),
        (CLIP(config_for(tokenizer)), "sigmoid", "must be true for the sigmoid loss, got false"),
    ):
        with pytest.raises(ValueError, match=words):
            CLIPTraining(model, CLIPLossConfig(kind), OPTIM)
    examples = TextImageExamples(split, tokenizer, biased.config, seed=0)
    with pytest.raises(
        ValueError, match=r"global_batch_size: expected one micro-batch.* got 2 of 6 pairs"
    ):
        train(
            CLIPTraining(biased, CLIPLossConfig("sigmoid"), OPTIM),
            examples,
            replace(CPU, micro_batch_size=2),
        )
    sigmoid = CLIPLossConfig("sigmoid", initial_scale=7.0, initial_bias=-3.0)
    CLIPTraining(biased, sigmoid, OPTIM)
    assert biased.logit_scale.exp().item() == pytest.approx(7)
    assert biased.logit_bias.item() == pytest.approx(-3)
