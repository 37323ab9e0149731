"""Few-shot evaluation with chosen support examples: choice, order, prompts, controls, scores."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_clip
import torch
from small_documents import Letters, build_reader, flat, settings
from torch.nn import functional as F

from rudolph.config.metric_names import metric_names
from rudolph.config.run import resolve_run
from rudolph.data.datasets.shapes import ShapesConfig
from rudolph.data.datasets.shapes_questions import ShapesQuestionsConfig
from rudolph.data.splits import DataConfig, Split, Splits
from rudolph.evaluation.context import EvaluationContext
from rudolph.evaluation.evaluators.chosen_shots import (
    few_shot_answers,
    few_shot_captions,
    few_shot_classification,
    shot_prompts,
)
from rudolph.evaluation.metrics.answers import token_f1
from rudolph.evaluation.shots import ShotConfig, SupportSet
from rudolph.families.documents import DocumentCapabilities
from rudolph.families.interface import Capabilities
from rudolph.files.settings import ConfigError
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.vision.clip import CLIP

GREEDY = TokenSamplingConfig(top_k=1)
SIZES = {"num_train": 60, "num_validation": 60, "num_test": 60}
SHOTS = ShotConfig(numbers=(0, 1, 3), num_support=40)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    config = DataConfig(
        dataset="shapes",
        image_size=tiny_clip.SIDE,
        shapes=ShapesConfig(**SIZES),
        shapes_questions=ShapesQuestionsConfig(**SIZES),
    )
    return Splits(config, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> ClipRanker:
    _, tokenizer = tiny_clip.scenes(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    return ClipRanker(CLIP(tiny_clip.config_for(tokenizer)), tokenizer)


def context_of(
    model: Any, splits: Splits, config: ShotConfig = SHOTS, dataset: str = "shapes", **changes: Any
) -> EvaluationContext:
    return EvaluationContext(
        model,
        GREEDY,
        GREEDY,
        num_examples=5,
        seed=0,
        shots=config,
        support=lambda: splits("train", dataset),
        **changes,
    )


def test_random_shots_depend_on_the_seed_and_the_query_alone(splits: Splits) -> None:
    test = splits("test")
    support = SupportSet(splits("train"), SHOTS, seed=3)
    together = support.choose(test, range(20))
    assert together.shape == (20, 3)
    for query in (0, 7, 19):
        assert np.array_equal(support.choose(test, [query])[0], together[query])
    assert all(len(set(row)) == 3 for row in together.tolist())
    assert set(together.flat) <= set(support.indices) and len(support.indices) == 40
    fewer = SupportSet(splits("train"), replace(SHOTS, numbers=(2,)), seed=3)
    assert np.array_equal(fewer.choose(test, range(20)), together[:, :2])
    other = SupportSet(splits("train"), SHOTS, seed=4)
    assert not np.array_equal(other.choose(test, range(20)), together)


def test_similar_shots_are_those_of_brute_force(splits: Splits, ranker: ClipRanker) -> None:
    train, test = splits("train"), splits("test")
    support = SupportSet(train, replace(SHOTS, choice="similar"), seed=3)
    chosen = support.choose(test, range(6), ranker=ranker)

    def embedding(split: Split, index: int) -> torch.Tensor:
        pixels = ranker.pixel_values(split.image_batch([index]))
        with torch.inference_mode():
            return ranker.clip.encode_image(pixels)[0].double()

    for query in range(6):
        own = embedding(test, query)
        cosines = {
            index: float(F.cosine_similarity(own, embedding(train, index), dim=0))
            for index in support.indices.tolist()
        }
        best = sorted(cosines.values(), reverse=True)[:3]
        assert [cosines[index] for index in chosen[query]] == pytest.approx(best, abs=1e-6)
    assert len(set(chosen[:, 0])) > 1


def test_the_image_of_a_query_is_never_its_shot(splits: Splits, ranker: ClipRanker) -> None:
    train = splits("train")
    for choice in ("random", "similar"):
        config = ShotConfig(numbers=(39,), choice=choice, num_support=60)
        support = SupportSet(train, config, seed=0)
        for index, row in enumerate(support.choose(train, range(60), ranker=ranker)):
            assert train.image_ids[index] not in train.image_ids[row]
    with pytest.raises(
        ValueError, match=r"shots\.numbers: expected at most \d+, .* shapes, got 6"
    ):
        SupportSet(train, ShotConfig(numbers=(60,)), seed=0).choose(train, [0])


def test_the_most_similar_shot_is_last_unless_reversed(splits: Splits, ranker: ClipRanker) -> None:
    train, test = splits("train"), splits("test")
    prompts = {}
    for order in ("given", "reversed"):
        config = replace(SHOTS, choice="similar", order=order)
        context = context_of(None, splits, config, ranker=ranker)
        support = SupportSet(train, config, seed=0)
        best = support.choose(test, [4], ranker=ranker)[0]
        *_, three, _, _ = shot_prompts("image_captioning", context, test, [4], support)
        prompts[order] = three.shots[0]
        closest = three.shots[0][-1 if order == "given" else 0]
        assert closest.answer == train.captions[best[0]]
        assert torch.equal(closest.image, train.image_batch([best[0]])[0])
    given, backwards = ([panel.answer for panel in row] for row in prompts.values())
    assert given == backwards[::-1] and len(set(given)) > 1


class CopyingModel(Capabilities):
    """A model that repeats the answer of the last shot, and keeps its prompts."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any]] = []

    def generate_text_after_shots(
        self, task: str, shots: Any, *, images: Any = None, questions: Any = None, **_: Any
    ) -> list[str]:
        self.calls.append((shots, images, questions))
        return [row[-1].answer if row else "" for row in shots]

    def loglikelihood_after_shots(
        self, task: str, choices: Any, shots: Any, **_: Any
    ) -> torch.Tensor:
        rows = [
            [float(bool(row) and choice == row[-1].answer) for choice in options]
            for row, options in zip(shots, choices, strict=True)
        ]
        return torch.tensor(rows)


def test_scores_are_those_of_the_answers_after_each_number_of_shots(splits: Splits) -> None:
    model, test, train = CopyingModel(), splits("test"), splits("train")
    context = context_of(model, splits)
    scores = {score.metric: score for score in few_shot_captions(context, test)}
    indices = context.eval_indices(test)
    chosen = SupportSet(train, SHOTS, seed=0).choose(test, indices)
    for number in (1, 3):
        # The first choice is the last shot.
        values = [
            token_f1(train.captions[row[0]], test.captions[index])
            for index, row in zip(indices, chosen, strict=True)
        ]
        score = scores[f"few_shot_captions/token_f1_{number}"]
        assert score.value == pytest.approx(np.mean(values)) and score.num_examples == 5
        assert score.low <= score.value <= score.high
    assert scores["few_shot_captions/token_f1_3"].value > 0
    assert scores["few_shot_captions/token_f1_0"].value == 0
    assert "settings=shots:1-random-given-of:40" in scores["few_shot_captions/token_f1_1"].protocol
    assert [len(row[0]) for row, *_ in model.calls] == [0, 1, 3, 3, 3]


def test_controls_change_the_images_of_shots_or_that_of_the_query(splits: Splits) -> None:
    model = CopyingModel()
    split = splits("test", "shapes_questions")
    few_shot_answers(context_of(model, splits, dataset="shapes_questions"), split)
    (*_, plain, shuffled, blind) = model.calls
    for before, after in zip(plain[0], shuffled[0], strict=True):
        assert [panel.answer for panel in before] == [panel.answer for panel in after]
        assert all(panel.question and panel.answer for panel in before)
        images = [[panel.image for panel in row] for row in (before, after)]
        assert all(torch.equal(images[0][at - 1], images[1][at]) for at in range(3))
        assert not all(torch.equal(*pair) for pair in zip(*images, strict=True))
    assert torch.equal(shuffled[1], plain[1]) and shuffled[2] == plain[2] == blind[2]
    assert (blind[1] == 0.5).all() and not (plain[1] == 0.5).all()
    for before, after in zip(plain[0], blind[0], strict=True):
        assert all(
            torch.equal(*(p.image for p in pair)) for pair in zip(before, after, strict=True)
        )
    one = CopyingModel()
    few_shot_answers(
        context_of(one, splits, ShotConfig(numbers=(0, 1)), dataset="shapes_questions"), split
    )
    assert len(one.calls) == 3, "one shot cannot be shuffled"


def test_classes_are_scored_after_shots_that_have_a_class(splits: Splits) -> None:
    test = splits("test")
    scores = {
        score.metric: score.value
        for score in few_shot_classification(context_of(CopyingModel(), splits), test)
    }
    names = {f"few_shot_classification/accuracy_{case}" for case in (0, 1, 3, "shuffled", "blind")}
    assert set(scores) == names
    dataset: Any = test.dataset
    support = SupportSet(
        splits("train"),
        SHOTS,
        seed=0,
        is_eligible=lambda index: splits("train").dataset.class_index(index) is not None,
    )
    with_class = [index for index in range(60) if dataset.class_index(index) is not None][:5]
    copied = [
        splits("train").dataset.class_index(row[0]) == dataset.class_index(index)
        for index, row in zip(with_class, support.choose(test, with_class), strict=True)
    ]
    assert scores["few_shot_classification/accuracy_1"] == pytest.approx(np.mean(copied))
    assert scores["few_shot_classification/accuracy_0"] == pytest.approx(1 / len(dataset.classes))


@pytest.mark.parametrize("family", ["flamingo", "llava"])
def test_a_batch_answers_as_single_prompts_do(family: str, splits: Splits) -> None:
    model, reader, form = build_reader(family)
    form = replace(form, max_length=1024)
    settings: Any = {"device": torch.device("cpu"), "max_new_tokens": 4}
    together, alone = (
        DocumentCapabilities(model, reader, Letters(), form, batch_size=size, **settings)
        for size in (64, 1)
    )
    split, train = splits("test", "shapes_questions"), splits("train", "shapes_questions")
    context = context_of(together, splits, dataset="shapes_questions")
    indices = context.eval_indices(split)
    questions = [split.questions[index] for index in indices]
    support = SupportSet(train, SHOTS, seed=0)
    encoded: list[int] = []
    model.vision.register_forward_hook(lambda module, inputs, _: encoded.append(len(inputs[0])))
    texts = {}
    for case, shots, images in shot_prompts(
        "question_answering", context, split, indices, support
    ):
        asked = {"images": images, "questions": questions}
        texts[case], single = (
            capabilities.generate_text_after_shots(
                "question_answering", shots, config=GREEDY, seeds=indices, **asked
            )
            for capabilities in (together, alone)
        )
        assert texts[case] == single
        choices = [[split.captions[index], "да", "нет"] for index in indices]
        scores = [
            capabilities.loglikelihood_after_shots("question_answering", choices, shots, **asked)
            for capabilities in (together, alone)
        ]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        # Each of the four calls encodes an image once, whatever the number of tokens or choices.
        assert sum(encoded) == 4 * sum(len(row) + 1 for row in shots)
        encoded.clear()
    assert texts["0"] != texts["3"] != texts["shuffled"] and len(set(texts["3"])) > 1


def test_shots_that_cannot_be_chosen_are_refused_when_a_file_is_loaded() -> None:
    def shots(**changes: Any) -> Any:
        evaluators = ["shapes/few_shot_captions", "new_words/few_shot"]
        changed = {f"evaluation.shots.{key}": value for key, value in changes.items()}
        flags = {"data.image_size": 24, "evaluation.evaluators": evaluators, **changed}
        return resolve_run(Path("x"), {**flat(settings("flamingo")), **flags})

    with pytest.raises(
        ConfigError, match=r"evaluation\.clip: expected a CLIP for .*choice similar"
    ):
        shots(choice="similar")
    for numbers in ([], [4, 2], [1, 1], [-1]):
        with pytest.raises(
            ConfigError, match=r"shots\.numbers: expected ascending numbers from 0"
        ):
            shots(numbers=numbers)
    with pytest.raises(ConfigError, match=r"shots\.choice must be one of random, similar, got"):
        shots(choice="nearest")
    names = metric_names(shots(numbers=[0, 5]))
    assert "shapes/few_shot_captions/caption_accuracy_5/train" in names
    assert "shapes/few_shot_captions/cider-d_blind/train" in names
    assert {name for name in names if "new_words" in name} == {
        f"new_words/few_shot/accuracy_{case}/train" for case in (0, 5, "shuffled", "blank")
    }
