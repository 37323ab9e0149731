"""Classifier of answers: fusion by hand, missing modalities, classes, and whole runs."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import run_tiny
from torch import Tensor, nn

from rudolph.config.experiment_file import Run, load_experiment
from rudolph.config.run import resolve_run
from rudolph.data.answer_classes import AnswerExamples, frequent_answers
from rudolph.data.datasets.shapes_questions import ShapesQuestionsConfig
from rudolph.data.splits import DataConfig, Split
from rudolph.families.interface import Parts
from rudolph.families.late_fusion import TowerSources
from rudolph.families.registry import family_of
from rudolph.files.settings import ConfigError
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.fusion.late_fusion import FUSIONS, NEED_ALL
from rudolph.models.late_fusion.classifier import MAX_ANSWER_BYTES, AnswerClassifier
from rudolph.models.vision.clip import CLIP, CLIPConfig
from rudolph.models.weights import meta_device, read_weights
from rudolph.reports.report_cards import read_card
from rudolph.reports.schema import CARD
from rudolph.runs.resolve import find_tokenizer, open_clip, open_run
from rudolph.sequence.conversation import IGNORE
from rudolph.sequence.layout import BOS, EOS, PAD
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.answers import summed_loss
from rudolph.training.optim import build_optimizers

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "fusion" / "late_classifier.yaml"
VARIANTS = [run for run in load_experiment(EXPERIMENT).runs if run.config.seed == 0]
SIDE, VOCABULARY, WIDTH = 24, 120, 6
TOWERS = {
    "embed_dim": 10,
    "image_resolution": SIDE,
    "vision_layers": 1,
    "vision_width": 16,
    "vision_patch_size": 8,
    "context_length": 24,
    "vocab_size": VOCABULARY,
    "transformer_width": 16,
    "transformer_heads": 2,
    "transformer_layers": 1,
}
QUESTIONS = {"num_train": 60, "num_validation": 20, "num_test": 20}
GREEDY = TokenSamplingConfig(top_k=1)


def section(**changes: Any) -> dict[str, Any]:
    fusion = {"kind": "gmu", "width": WIDTH, "rank": 5, "hidden": 7, "gate": "softmax"}
    own = {"family": "late_fusion", "towers": TOWERS, "fusion": fusion, "num_answers": 9}
    return own | changes


def resolve(**changes: Any) -> Any:
    flat = {f"model.{key}": value for key, value in section().items() if key != "towers"}
    flat |= {f"model.towers.{key}": value for key, value in TOWERS.items()}
    fusion = flat.pop("model.fusion")
    flat |= {f"model.fusion.{key}": value for key, value in fusion.items()}
    flat |= {"data.dataset": "shapes_questions", "data.tasks": {"question_answering": 1.0}}
    flat |= {"data.image_size": SIDE, "tokenizer.vocab_size": VOCABULARY}
    return resolve_run(Path("x"), flat | changes)


def classifier(kind: str) -> AnswerClassifier:
    config = resolve(**{"model.fusion.kind": kind})
    torch.manual_seed(0)
    return family_of(config.model).empty(config).eval()


def inputs(number: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (number, 7), generator=generator)
    ids[:, 0], ids[:, 5], ids[:, 6] = BOS, EOS, PAD
    return torch.randn(number, 3, SIDE, SIDE, generator=generator), ids


def clip_of(model: AnswerClassifier) -> CLIP:
    """Return a CLIP with the towers of a classifier."""
    clip = CLIP(CLIPConfig(**TOWERS)).eval()
    clip.visual.load_state_dict(model.vision.state_dict())
    missing, unexpected = clip.load_state_dict(model.text.state_dict(), strict=False)
    assert not unexpected and all(name.startswith(("visual.", "logit_")) for name in missing)
    return clip


def normalised(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def product_by_hand(v: Tensor, t: Tensor, w: dict[str, Tensor]) -> Tensor:
    return w["fusion.weight"] * linear(v, w, "project.0") * linear(t, w, "project.1")


def sum_by_hand(v: Tensor, t: Tensor, w: dict[str, Tensor]) -> Tensor:
    matrix = torch.cat([w["fusion.project.0.weight"], w["fusion.project.1.weight"]], dim=1)
    return torch.cat([v, t], dim=1) @ matrix.T + w["fusion.bias"]


def gmu_by_hand(v: Tensor, t: Tensor, w: dict[str, Tensor]) -> Tensor:
    gates = linear(torch.cat([v, t], dim=1), w, "fusion.gate").sigmoid()
    first, second = (
        linear(x, w, f"fusion.project.{number}").tanh() for number, x in enumerate((v, t))
    )
    return gates[:, :WIDTH] * first + gates[:, WIDTH:] * second


BY_HAND = {"product": product_by_hand, "linear_sum": sum_by_hand, "gmu": gmu_by_hand}


@pytest.mark.parametrize("kind", BY_HAND)
@torch.no_grad()
def test_logits_are_those_of_a_clip_and_a_fusion_by_hand(kind: str) -> None:
    model, (pixels, ids) = classifier(kind), inputs()
    clip, weights = clip_of(model), model.state_dict()
    fuse: Callable[..., Tensor] = BY_HAND[kind]
    fused = fuse(normalised(clip.encode_image(pixels)), normalised(clip.encode_text(ids)), weights)
    expected = linear(fused, weights, "to_logits")
    torch.testing.assert_close(model(pixels, ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FUSIONS)
@torch.no_grad()
def test_a_missing_modality_is_left_out_by_the_fusion_or_read_as_zeros(kind: str) -> None:
    model, (pixels, ids) = classifier(kind), inputs()
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    logits = model(pixels, ids, present)
    vectors = [normalised(model.vision(pixels)), normalised(model.text.encode_text(ids))]
    if kind in NEED_ALL:
        vectors = [x * flag[:, None] for x, flag in zip(vectors, present.T, strict=True)]
    projected = [layer(x) for layer, x in zip(model.project, vectors, strict=True)]
    fused = model.fusion(projected, None if kind in NEED_ALL else present)
    torch.testing.assert_close(logits, model.to_logits(fused), atol=1e-5, rtol=1e-4)
    complete = model(pixels, ids)
    torch.testing.assert_close(logits[[0, 3]], complete[[0, 3]])
    assert not torch.allclose(logits[1], complete[1])
    pixels[1], ids[2, 1:5] = torch.randn(3, SIDE, SIDE), 9
    torch.testing.assert_close(model(pixels, ids, present), logits)


def test_answers_are_stored_with_the_weights() -> None:
    model, other = classifier("gmu"), classifier("product")
    answers = ("да", "нет", *(f"ответ {number}" for number in range(7)))
    assert not any(model.answers)
    model.set_answers(answers)
    other.answer_bytes = model.state_dict()["answer_bytes"]
    assert model.answers == other.answers == answers
    with pytest.raises(ValueError, match=rf"answers: expected at most {MAX_ANSWER_BYTES} bytes"):
        model.set_answers(["ы" * MAX_ANSWER_BYTES, *answers[1:]])


# --- the examples --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    questions = ShapesQuestionsConfig(**QUESTIONS)
    data = DataConfig(dataset="shapes_questions", image_size=SIDE, shapes_questions=questions)
    return Split(data, "train", tmp_path_factory.mktemp("cache"))


def tokenizer_of(split: Split) -> Tokenizer:
    texts, path = [*split.captions, *split.questions], split.cache / "bpe.model"
    return Tokenizer.train(texts, vocab_size=VOCABULARY, path=path)


def examples_of(split: Split, tasks: dict[str, float], **settings: Any) -> AnswerExamples:
    data = DataConfig(dataset="shapes_questions", tasks=tasks)
    return AnswerExamples(
        [(entry, split) for entry in data.mixture],
        frequent_answers([split], 9),
        tokenizer_of(split),
        CLIPConfig(**TOWERS),
        seed=3,
        **settings,
    )


def test_the_most_frequent_answers_are_the_classes_and_others_are_counted(split: Split) -> None:
    examples = examples_of(split, {"question_answering": 1.0})
    counts = Counter(split.captions)
    least = min(counts[answer] for answer in examples.answers)
    assert all(counts[answer] <= least for answer in set(counts) - set(examples.answers))
    labels = examples.whole(range(60)).labels
    for label, answer in zip(labels.tolist(), split.captions, strict=True):
        expected = examples.answers.index(answer) if answer in examples.answers else IGNORE
        assert label == expected
    outside = int((labels == IGNORE).sum())
    assert 0 < outside == 60 - sum(counts[answer] for answer in examples.answers)
    assert examples.note().startswith(f"{outside} of 60 answers are none of 9 classes")
    with pytest.raises(ValueError, match=rf"num_answers: expected at most {len(counts)}, .* 999"):
        frequent_answers([split], 999)


def test_the_task_decides_which_modalities_an_example_has(split: Split) -> None:
    tasks = {"question_answering": 1.0, "text_question_answering": 1.0, "image_captioning": 1.0}
    batch = examples_of(split, tasks).batch(range(40))
    shown, answered = batch.present.T
    assert {tuple(row) for row in batch.present.tolist()} == {(1, 1), (0, 1), (1, 0)}
    assert torch.equal(batch.pixel_values.flatten(1).any(1), shown)
    assert torch.equal(batch.input_ids[:, 1] != EOS, answered)


def test_an_example_does_not_depend_on_its_batch_and_loses_at_most_one_modality(
    split: Split,
) -> None:
    examples = examples_of(split, {"question_answering": 1.0}, modality_dropout=0.4)
    together = examples.batch(range(200))
    alone = [examples.batch([number]) for number in range(0, 200, 20)]
    for part, rows in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(part[::20], torch.cat(rows))
    fractions = together.present.double().mean(0)
    assert ((fractions - 0.8).abs() < 4 * math.sqrt(0.16 / 200)).all()
    assert together.present.any(1).all()
    assert examples.whole(range(60)).present.all()


def test_the_loss_is_a_plain_cross_entropy_of_the_classes() -> None:
    logits, labels = torch.randn(5, 9), torch.tensor([3, IGNORE, 0, 8, IGNORE])
    plain = [-math.log(logits[row].softmax(0)[labels[row]]) for row in (0, 2, 3)]
    assert summed_loss(logits, labels).item() == pytest.approx(sum(plain), rel=1e-5)
    assert summed_loss(logits, torch.full((5,), IGNORE)).item() == 0


# --- whole runs ----------------------------------------------------------------------------------

TRAINING = {"num_steps": 60, "global_batch_size": 16, "validate_every": 30}


def tiny(folder: Path, *overrides: str, **changes: Any) -> Path:
    """Return the folder of a finished tiny run of the classifier."""
    settings = (
        f"model={json.dumps(section(**changes))}",
        "data.dataset=shapes_questions",
        "data.tasks={question_answering: 1.0}",
        f"data.shapes_questions={json.dumps(QUESTIONS)}",
        f"optim={json.dumps({**TRAINING, 'ema_decay': None})}",
        "tokenizer.bpe_dropout=0",
        "evaluation.evaluators=[answer_f1, text_answers, caption_f1]",
        "evaluation.num_examples=20",
        "evaluation.grid_prompts=[]",
    )
    return run_tiny(folder, (*settings, *overrides))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = json.dumps({"family": "clip", **TOWERS})
    overrides = (f"model={model}", "evaluation.evaluators=[]", "optim.ema_decay=null")
    return run_tiny(tmp_path_factory.mktemp("clip"), overrides)


@pytest.fixture(scope="module")
def trained(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"vision": str(clip), "text": str(clip)}
    changes = {"parts": parts, "trained": "without_vision", "modality_dropout": 0.2}
    return tiny(tmp_path_factory.mktemp("late"), **changes)


def test_a_run_trains_its_fusion_on_the_encoders_of_a_clip(trained: Path, clip: Path) -> None:
    weights = read_weights(trained / "checkpoints" / "late_fusion.safetensors")
    before = open_clip(str(clip)).clip.state_dict()
    for name, value in weights.items():
        tower, _, own = name.partition(".")
        if tower == "vision":
            assert torch.equal(value, before[f"visual.{own}"]), name
        elif tower == "text":
            assert value.shape == before[own].shape
    assert not torch.equal(weights["text.text_projection"], before["text_projection"])
    tokenizer = find_tokenizer(str(clip), runs=clip.parent, uri="")
    assert (trained / "checkpoints" / "bpe.model").read_bytes() == tokenizer.read_bytes()
    [path] = trained.parent.parent.glob(".cache/late_fusion-*/curves.jsonl")
    logged = [json.loads(line)[1] for line in path.read_text().splitlines()]
    losses = [values["late_fusion/train/loss"] for values in logged if len(values) == 1]
    assert losses[-1] < losses[0] - 0.3


def test_the_report_card_has_answers_and_both_controls(trained: Path) -> None:
    card = read_card(trained / CARD).set_index("score")
    for name in ("answers", "text_question_answering", "image_to_text"):
        assert card.loc[f"{name}/exact_match/train", "count"] == 20
    train = card.loc["answers/exact_match/train"]
    assert train["value"] > train["chance"]


def test_a_restored_run_generates_its_likeliest_class(trained: Path) -> None:
    capabilities, config = open_run(trained)
    answers, images = capabilities.answers, torch.rand(3, 3, SIDE, SIDE)
    asked: dict[str, Any] = {"images": images, "questions": ["какого цвета круг?"] * 3}
    unknown = "ни один из ответов"
    scores = capabilities.loglikelihood("question_answering", [[*answers, unknown]] * 3, **asked)
    assert scores.shape == (3, 10) and (scores[:, -1] == -torch.inf).all()
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))
    seeds = {"seeds": [1, 2, 3], "config": GREEDY}
    likeliest = [answers[number] for number in scores.argmax(1)]
    assert capabilities.generate_text("question_answering", **seeds, **asked) == likeliest
    spelled = {**asked, "allowed_characters": "данет"}
    words = capabilities.generate_text("question_answering", **seeds, **spelled)
    assert set(words) <= {"да", "нет"}
    with pytest.raises(ValueError, match="expected a class that consists of '0', got none"):
        capabilities.generate_text(
            "question_answering", **seeds, **asked | {"allowed_characters": "0"}
        )
    with pytest.raises(ValueError, match="question_answering: expected images, got none"):
        capabilities.loglikelihood("question_answering", [answers], questions=["где круг?"])
    model, parts = family_of(config.model).restore(trained / "checkpoints", config)
    again = family_of(config.model).open(config, model, parts)
    repeated = again.loglikelihood("question_answering", [answers] * 3, **asked)
    assert torch.equal(repeated, scores[:, :-1])


def test_a_second_run_continues_with_the_same_classes_alone(trained: Path, tmp_path: Path) -> None:
    again = tiny(tmp_path, "optim.num_steps=0", init=str(trained))
    names = [run / "checkpoints" / "late_fusion.safetensors" for run in (trained, again)]
    before, after = map(read_weights, names)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(ValueError, match=r"model\.init: expected .* got other classes in"):
        tiny(tmp_path, "data.shapes_questions.seed=1", init=str(trained))


def test_towers_of_another_shape_are_refused(clip: Path, tmp_path: Path) -> None:
    wide = {**TOWERS, "vision_width": 32}
    with pytest.raises(ValueError, match=r"model\.towers\.vision_width: expected 16 as in .*32"):
        tiny(tmp_path, parts={"vision": str(clip), "text": None}, towers=wide)
    more = {**TOWERS, "context_length": 30}
    with pytest.raises(ValueError, match=r"model\.towers\.context_length: expected 24 as in"):
        tiny(tmp_path, parts={"vision": None, "text": str(clip)}, towers=more)
    with pytest.raises(
        ValueError, match=r"model\.num_answers: expected at most \d+, the different"
    ):
        tiny(tmp_path, num_answers=500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.fusion.kind": "sum"}, r"model\.fusion\.kind: expected one of additive, .*'sum'"),
        (
            {"model.towers.vocab_size": 119},
            r"model\.towers\.vocab_size: expected at least 120",
        ),
        (
            {"data.tasks": {"shapes/text_to_text": 1.0}},
            r"data\.tasks\.shapes/text_to_text: expected a task that reads an image or a question",
        ),
        ({"tokenizer.bpe_dropout": 0.1}, r"bpe_dropout: must be 0 for family late_fusion"),
        ({"model.modality_dropout": 1.5}, r"modality_dropout"),
        ({"model.init": "a", "model.parts.text": "b"}, r"parts: expected none with init"),
        (
            {"model.towers.has_logit_bias": True},
            r"has_logit_bias: expected false without a CLIP",
        ),
        (
            {"evaluation.evaluators": ["retrieval"]},
            r"retrieval needs a model with embed_image",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**changes)


# --- the experiment ------------------------------------------------------------------------------


def test_the_variants_of_the_experiment_have_equal_parameters_after_the_encoders() -> None:
    counts = {}
    for run in VARIANTS:
        with meta_device():
            model = family_of(run.config.model).empty(run.config)
        after: list[nn.Module] = [model.project, model.fusion, model.to_logits]
        counts[run.variant] = sum(p.numel() for part in after for p in part.parameters())
    assert len(counts) == 8
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


@pytest.mark.parametrize("run", VARIANTS, ids=lambda run: run.variant)
def test_every_variant_of_the_experiment_learns_in_two_steps(run: Run, split: Split) -> None:
    model_section = replace(run.config.model, parts=TowerSources(), num_answers=9)
    config, parts = replace(run.config, model=model_section), Parts(tokenizer_of(split))
    family = family_of(config.model)
    examples = family.examples(config, lambda *_: split, "train", parts)
    module = family.training(config, family.build(config, parts), examples, None)
    optimizers, batch, losses = (
        build_optimizers(module.model, config.optim),
        examples.batch(range(8)),
        [],
    )
    for _ in range(2):
        loss = summed_loss(module.logits(batch), batch.labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[0]) and losses[1] < losses[0]
