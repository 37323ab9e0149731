"""Runs of families that read documents: training of some parts, and few-shot evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_documents import LANGUAGE_MODEL, VISION, VOCABULARY, flat, settings
from tiny_run import run_tiny

from rudolph.config.metric_names import metric_names
from rudolph.config.run import resolve_run
from rudolph.data.splits import DataConfig, Splits
from rudolph.evaluation.context import EvaluationContext
from rudolph.evaluation.evaluators.few_shot import few_shot, few_shot_text
from rudolph.evaluation.shots import ShotConfig
from rudolph.families.interface import Capabilities
from rudolph.files.settings import ConfigError
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.weights import read_weights
from rudolph.reports.report_cards import CARD, read_card
from rudolph.runs.resolve import open_clip, open_run

NUMBERS = ShotConfig().numbers
TINY = (
    "data.dataset=new_words",
    'data.new_words={"num_train": 70, "num_validation": 70, "num_test": 70, "max_shots": 2}',
    "evaluation.splits=[test]",
    "evaluation.num_examples=6",
    "evaluation.grid_prompts=[]",
)


def tiny(
    folder: Path, family: str, evaluators: list[str], *, clip: Path | None = None, **changes: Any
) -> Path:
    """Return the folder of a finished tiny run of a family, with similar shots by a CLIP."""
    overrides = [
        f"{key}={json.dumps(value)}" for key, value in settings(family, **changes).items()
    ]
    overrides += ["tokenizer.bpe_dropout=0", f"evaluation.evaluators={json.dumps(evaluators)}"]
    if clip is not None:
        overrides += [f"evaluation.clip={clip}", "evaluation.shots.choice=similar"]
        overrides += ["evaluation.shots.numbers=[0, 2]"]
    return run_tiny(folder, (*TINY, *overrides, "optim.ema_decay=null"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    return tiny(folder, "language_model", ["few_shot_text", "text_answers"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    section = {
        "family": "clip",
        "embed_dim": 16,
        "image_resolution": 24,
        "vision_layers": 1,
        "vision_width": 16,
        "vision_patch_size": 8,
        "context_length": 24,
        "vocab_size": VOCABULARY,
        "transformer_width": 16,
        "transformer_heads": 2,
        "transformer_layers": 1,
    }
    overrides = (f"model={json.dumps(section)}", "evaluation.evaluators=[]")
    return run_tiny(tmp_path_factory.mktemp("clip"), (*overrides, "optim.ema_decay=null"))


def test_a_language_model_run_scores_its_episodes(language_model: Path) -> None:
    card = read_card(language_model / CARD).set_index("score")
    names = {f"few_shot_text/accuracy_{number}/test" for number in NUMBERS}
    assert names < set(card.index)
    assert card.loc["few_shot_text/accuracy_0/test", "chance"] == pytest.approx(1 / 8)
    assert card.loc["few_shot_text/accuracy_8/test", "chance"] == pytest.approx(1 / 2)
    capabilities, config = open_run(language_model)
    assert config.model.family == "language_model"
    scores = capabilities.loglikelihood(
        "text_question_answering", [["дакс", "вуг"]], questions=["красный круг"]
    )
    assert scores.shape == (1, 2) and (scores < 0).all()


@pytest.mark.parametrize("family", ["flamingo", "llava"])
def test_a_run_trains_only_what_its_stage_trains(
    family: str, language_model: Path, clip: Path, tmp_path: Path
) -> None:
    parts = {"vision": str(clip), "language_model": str(language_model)}
    evaluators = ["few_shot", "caption_f1", "few_shot_captions"]
    folder = tiny(tmp_path, family, evaluators, parts=parts, clip=clip)
    weights = read_weights(folder / "checkpoints" / f"{family}.safetensors")
    frozen = read_weights(language_model / "checkpoints" / "language_model.safetensors")
    for name, value in frozen.items():
        assert torch.equal(weights[f"language_model.{name}"], value), name
    vision = open_clip(str(clip)).clip.state_dict()
    copied = [name for name in weights if name.startswith("vision.encoder.")]
    assert copied
    for name in copied:
        assert torch.equal(weights[name], vision["visual." + name.removeprefix("vision.encoder.")])
    if family == "flamingo":
        assert all(weights[name].abs() > 0 for name in weights if name.endswith("_gate"))
    card = read_card(folder / CARD).set_index("score")
    assert set(card.index) == set(metric_names(open_run(folder)[1]))
    assert "few_shot_captions/token_f1_blind/test" in card.index
    assert (folder / "checkpoints" / "bpe.model").read_bytes() == (
        language_model / "checkpoints" / "bpe.model"
    ).read_bytes()
    capabilities, _ = open_run(folder)
    images = torch.rand(2, 3, 24, 24)
    greedy = {"config": TokenSamplingConfig(top_k=1), "seeds": [1, 2]}
    assert len(capabilities.generate_text("image_captioning", images=images, **greedy)) == 2
    with pytest.raises(ValueError, match="image_captioning: expected images, got none"):
        capabilities.generate_text("image_captioning", **greedy)


@pytest.mark.parametrize("family", ["flamingo", "llava"])
def test_low_rank_updates_change_the_blocks_of_the_language_model_alone(
    family: str, language_model: Path, tmp_path: Path
) -> None:
    parts = {"language_model": str(language_model)}
    folder = tiny(tmp_path, family, [], parts=parts, lora_rank=2, lora_alpha=64)
    weights = read_weights(folder / "checkpoints" / f"{family}.safetensors")
    frozen = read_weights(language_model / "checkpoints" / "language_model.safetensors")
    for name, before in frozen.items():
        change = weights[f"language_model.{name}"] - before
        is_target = name.endswith("_proj.weight")
        assert bool(change.abs().max() > 0) == is_target, name
        if is_target:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name


def test_a_second_stage_starts_from_the_first_and_keeps_its_tokenizer(
    language_model: Path, tmp_path: Path
) -> None:
    first = tiny(tmp_path, "llava", [], parts={"language_model": str(language_model)})
    second = tiny(tmp_path, "llava", [], init=str(first), trained="without_vision")
    before, after = (
        read_weights(run / "checkpoints" / "llava.safetensors") for run in (first, second)
    )
    for name, value in before.items():
        is_kept = name.startswith("vision.")
        assert torch.equal(value, after[name]) == is_kept, name
    tokenizers = [(run / "checkpoints" / "bpe.model").read_bytes() for run in (first, second)]
    assert (
        tokenizers[0]
        == tokenizers[1]
        == (language_model / "checkpoints" / "bpe.model").read_bytes()
    )
    again = tiny(tmp_path, "language_model", [], init=str(language_model))
    assert (again / "checkpoints" / "bpe.model").read_bytes() == tokenizers[0]


@pytest.mark.parametrize("key", ["init", "parts"])
def test_a_missing_run_is_named_before_any_data_is_read(key: str, tmp_path: Path) -> None:
    source = "experiment:fusion/llava_shapes_stage1"
    changes = {"init": source} if key == "init" else {"parts": {"vision": source}}
    with pytest.raises(ValueError, match=r"llava_shapes_stage1\. Train it with `rudolph run exp"):
        tiny(tmp_path, "llava", [], **changes)
    assert not list((tmp_path / "runs" / ".cache").glob("*.npy"))


def test_choices_must_be_equally_many_for_each_text(language_model: Path) -> None:
    capabilities, _ = open_run(language_model)
    with pytest.raises(
        ValueError, match=r"choices: expected equally many for each text, got \[1, 2"
    ):
        capabilities.loglikelihood(
            "text_question_answering", [["дакс"], ["дакс", "вуг"]], questions=["круг", "круг"]
        )


def test_parts_of_another_shape_are_refused(
    language_model: Path, clip: Path, tmp_path: Path
) -> None:
    parts = {"vision": None, "language_model": str(language_model)}
    wide = {**LANGUAGE_MODEL, "mlp_size": 32}
    with pytest.raises(ValueError, match=r"model\.language_model: expected the settings of .*24"):
        tiny(tmp_path, "flamingo", [], parts=parts, language_model=wide)
    deep = {**VISION["vision"], "num_layers": 2}
    parts = {"vision": str(clip), "language_model": None}
    with pytest.raises(ValueError, match=r"model\.vision: expected VisionConfig\(.*num_layers=1"):
        tiny(tmp_path, "llava", [], parts=parts, vision=deep)
    parts = {"vision": str(language_model), "language_model": None}
    with pytest.raises(ValueError, match="expected a CLIP, got a LanguageModel"):
        tiny(tmp_path, "llava", [], parts=parts)


def resolve(family: str, **changes: Any) -> None:
    resolve_run(Path("x"), {"data.image_size": 24, **flat(settings(family)), **changes})


def test_encoders_connectors_and_fusions_that_do_not_fit_are_refused() -> None:
    for changes, message in (
        ({"encoders": []}, "encoders: expected different encoders, got"),
        ({"encoders": ["codes", "vit"]}, "encoders: expected codes alone, got"),
        ({"encoders": ["codes"]}, "connector.kind: expected table for encoder codes, got pool"),
        ({"connector.kind": "table"}, "connector.kind: table needs encoder codes, got"),
        (
            {"late_fusion.kind": "gated", "scores_questions": True},
            "scores_questions: expected f",
        ),
        (
            {"late_fusion.kind": "gated", "connector.kind": "mlp"},
            "connector: expected one vec",
        ),
        ({"late_fusion.kind": "gmu", "question_first": True}, "question_first: expected false"),
        ({"lora_rank": 2, "trained": "all"}, "lora_rank: expected null where trained includes"),
        (
            {"late_fusion.kind": "sum"},
            r"model\.late_fusion\.kind: expected one of additive, .*got 'sum'",
        ),
        ({"encoders": ["conv", "vit"]}, "encoders: expected one image size for all, got"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve("llava", **{f"model.{key}": value for key, value in changes.items()})
    with pytest.raises(ConfigError, match=r"encoders: expected none of codes, which family llava"):
        resolve("flamingo", **{"model.encoders": ["codes"]})


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.language_model\.vocab_size: expected 121, one"):
        resolve("flamingo", **{"model.language_model.vocab_size": 120})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected 121"):
        resolve("language_model", **{"model.vocab_size": 120})
    with pytest.raises(ConfigError, match=r"data\.tasks\.image_captioning: .* cannot read images"):
        resolve("language_model", **{"data.tasks": {"image_captioning": 1}})
    with pytest.raises(ConfigError, match=r"data\.tasks\.text_to_image: .* cannot generate im"):
        resolve("llava", **{"data.tasks": {"text_to_image": 1}})
    with pytest.raises(ConfigError, match=r"model\.resampler\.width: expected 16, the channels"):
        resolve("flamingo", **{"model.resampler.width": 8})
    with pytest.raises(ConfigError, match=r"question_answering: expected a task with images, sin"):
        resolve("llava", **{"data.tasks": {"shapes_questions/text_question_answering": 1}})
    resolve(
        "llava",
        **{"model.trained": "all", "data.tasks": {"shapes_questions/text_question_answering": 1}},
    )
    with pytest.raises(
        ConfigError, match=r"tokenizer\.bpe_dropout: must be 0 for family flamingo"
    ):
        resolve("flamingo", **{"tokenizer.bpe_dropout": 0.1})
    with pytest.raises(ConfigError, match=r"parts: expected none with init"):
        resolve("flamingo", **{"model.init": "runs/x", "model.parts": {"vision": "runs/y"}})
    with pytest.raises(ConfigError, match=r"model\.offset must lie in \[0, 2\), got 2"):
        resolve("flamingo", **{"model.offset": 2})
    with pytest.raises(
        ConfigError, match=r"model\.connector\.factor: expected a divisor of the grid 3x3"
    ):
        resolve("llava", **{"model.connector.factor": 2})
    with pytest.raises(ConfigError, match=r"caption_f1 shows images, which family language_model"):
        resolve("language_model", **{"evaluation.evaluators": ["caption_f1"]})
    with pytest.raises(ConfigError, match=r"missing_image: legacy needs a model that generates"):
        resolve("llava", **{"evaluation.missing_image": "legacy"})
    with pytest.raises(ConfigError, match=r"few_shot needs a model with loglikelihood_after"):
        resolve_run(
            Path("x"),
            {"data.dataset": "new_words", "data.image_size": 256}
            | {"evaluation.evaluators": ["few_shot"]},
        )


class Oracle(Capabilities):
    """A model that compares colours and shapes exactly and guesses evenly otherwise."""

    def loglikelihood_after_shots(
        self,
        task: str,
        choices: Any,
        shots: Any,
        *,
        images: Any = None,
        questions: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        rows = []
        for row, (options, shown) in enumerate(zip(choices, shots, strict=True)):
            known = {panel.question or None: panel.answer for panel in shown}
            words = [known.get(questions[row])] if questions[row] in known else options
            excluded = set(known.values()) - set(words) if words is not options else set()
            if words is options:
                excluded = set(known.values())
            rows.append(
                [0.0 if word in words and word not in excluded else -9.0 for word in options]
            )
        return torch.tensor(rows)


def test_the_shot_curve_of_an_oracle_is_that_of_an_ideal_observer(tmp_path: Path) -> None:
    data = DataConfig(dataset="new_words", image_size=24, tasks={"image_captioning": 1.0})
    split = Splits(data, tmp_path)("test")
    context = EvaluationContext(
        Oracle(), TokenSamplingConfig(), TokenSamplingConfig(), num_examples=500, seed=0
    )
    scores = {score.metric: score for score in few_shot_text(context, split)}
    for number in NUMBERS:
        unseen = 0.5**number
        other = 1 / 8 if number == 0 else 1 / 7
        expected = 1 - unseen + unseen * other
        score = scores[f"few_shot_text/accuracy_{number}"]
        assert score.value == pytest.approx(expected, abs=0.05)
        assert score.chance == (1 / 8 if number == 0 else 1 / 2)


def test_controls_change_images_alone(tmp_path: Path) -> None:
    data = DataConfig(dataset="new_words", image_size=24, tasks={"image_captioning": 1.0})
    split = Splits(data, tmp_path)("test")
    calls: list[Any] = []

    def record(task: str, choices: Any, shots: Any, **rest: Any) -> torch.Tensor:
        calls.append((shots, rest["images"]))
        return torch.zeros(len(choices), len(choices[0]))

    model: Any = SimpleNamespace(loglikelihood_after_shots=record)
    context = EvaluationContext(
        model, TokenSamplingConfig(), TokenSamplingConfig(), num_examples=7, seed=0
    )
    scores = few_shot(context, split)
    assert [score.metric.rpartition("_")[2] for score in scores[-2:]] == ["shuffled", "blank"]
    plain, shuffled, blank = calls[NUMBERS.index(8)], *calls[-2:]
    assert torch.equal(shuffled[1], plain[1].roll(-1, 0))
    assert (blank[1] == 0.5).all()
    for control in (shuffled, blank):
        for before, after in zip(plain[0], control[0], strict=True):
            assert [panel.answer for panel in before] == [panel.answer for panel in after]
    for row, shown in enumerate(plain[0]):
        others = shuffled[0][row - 1]
        assert all(
            torch.equal(*(p.image for p in pair)) for pair in zip(shown, others, strict=True)
        )
        assert all((panel.image == 0.5).all() for panel in blank[0][row])
