"""The scores of Fusion Brain Challenge 2, computed by hand with and without each quirk."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rudolph.cli import main
from rudolph.data.datasets.fusion_brain_files import (
    TaskRecord,
    read_tasks,
    write_predictions,
    write_tasks,
)
from rudolph.evaluation.metrics.answers import MetricProtocol
from rudolph.evaluation.metrics.fusion_brain import (
    CHALLENGE_QUIRKS,
    CHALLENGE_TASKS,
    NO_QUIRKS,
    THRESHOLDS,
    Quirks,
    captioning_scores,
    first_texts,
    generation_score,
    integral_score,
    math_qa_scores,
    recognition_scores,
    text_qa_scores,
    variants,
    visual_qa_scores,
)


def without(quirk: str) -> Quirks:
    return replace(CHALLENGE_QUIRKS, **{quirk: False})


def one(score, answer: str, truths: list[str], **options) -> float:
    [found] = score({"0": answer}, {"0": truths}, **options)
    return found


def test_the_files_of_the_challenge_are_read(tmp_path: Path) -> None:
    asked = {str(at): [{"type": "text", "content": "что?"}] for at in range(3)}
    answers = {
        "0": [{"type": "image", "content": "0.png"}, {"type": "text", "content": "кот"}],
        "1": [{"type": "text", "content": ["а", "б"]}, {"type": "text", "content": "в"}],
        "2": [{"type": "image", "content": "2.png"}],
    }
    for name, content in (("asked", asked), ("answers", answers)):
        (tmp_path / name).write_text(json.dumps(content))
    records = read_tasks(tmp_path / "asked", tmp_path / "answers")
    assert first_texts(records) == {"0": "кот", "1": "а", "2": ""}
    assert variants(records) == {"0": ["кот"], "1": ["а", "б"], "2": []}


@pytest.mark.parametrize(
    ("answer", "truths", "expected"),
    [
        ("Две красные собаки!", ["2 красная собака"], 1.0),
        ("красная собака", ["собака", "кошка"], 2 / 3),
        ("", [""], 1.0),
        ("", ["кот"], 0.0),
        ("волк (b)", ["b"], 2 / 3),
    ],
)
def test_text_answers_are_compared_by_lemmas(
    answer: str, truths: list[str], expected: float
) -> None:
    assert one(text_qa_scores, answer, truths) == pytest.approx(expected)
    assert one(text_qa_scores, answer, truths, quirks=NO_QUIRKS) == pytest.approx(expected)


def test_the_letter_of_an_answer_gets_a_second_try() -> None:
    plain = without("letter_fallback")
    said = "это ответ b"
    assert one(text_qa_scores, said, ["b"]) == 1
    assert one(text_qa_scores, said, ["b"], quirks=plain) == pytest.approx(1 / 2)
    # The second attempt counts even if it is worse; letters are matched before lower-casing.
    assert one(text_qa_scores, "кот c e x", ["кот"]) == 0
    assert one(text_qa_scores, "кот C E X", ["кот"]) == pytest.approx(2 / 5)
    assert one(math_qa_scores, "ответ d", ["d"]) == 1
    assert one(math_qa_scores, "ответ d", ["d"], quirks=plain) == 0


def test_math_answers_keep_their_minus() -> None:
    assert one(math_qa_scores, "-5.", ["-5"]) == 1
    assert one(math_qa_scores, "5", ["-5"]) == 0
    assert one(math_qa_scores, "Пять", ["5"]) == 1
    assert one(text_qa_scores, "-5", ["5"]) == 1


@pytest.mark.parametrize("score", [text_qa_scores, math_qa_scores, recognition_scores])
def test_a_missing_answer_to_a_text_is_0(score) -> None:
    truths = {"0": ["кот"], "1": ["кит"]}
    assert score({"1": "кит"}, truths).tolist() == [0, 1]
    with pytest.raises(ValueError, match="got none for 7"):
        score({"7": "кит"}, truths)
    with pytest.raises(ValueError, match="got none for any"):
        score({}, {})


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("5", "5", 1.0),
        ("пять", "5", 1.0),
        ("2", "8", 0.25),
        ("8 котов", "2", 0.25),
        ("0", "0", 1.0),
        ("0", "3", 0.0),
        ("много", "3", 0.0),
        ("Коты!", "кот", 1.0),
    ],
)
def test_an_answer_about_a_image(answer: str, truth: str, expected: float) -> None:
    for quirks in (CHALLENGE_QUIRKS, NO_QUIRKS):
        found = one(visual_qa_scores, answer, [truth, "-"], quirks=quirks)
        assert found == pytest.approx(expected)


def test_meteor_of_an_answer_pays_no_regard_to_order() -> None:
    # Two of three words match two of two: 10 P R / (R + 9 P).
    expected = 10 * (2 / 3) / (1 + 9 * (2 / 3))
    for quirks in (CHALLENGE_QUIRKS, NO_QUIRKS):
        found = one(visual_qa_scores, "стол и кот", ["кот стол"], quirks=quirks)
        assert found == pytest.approx(expected)


def test_an_answer_of_several_words_is_lemmatised_as_one() -> None:
    answer, truth = "красной собаки", ["красная собака"]
    whole = replace(NO_QUIRKS, lemmatised_as_one_word=True, english_stems=True)
    # Only the last word is lemmatised.
    assert one(visual_qa_scores, answer, truth, quirks=whole) == pytest.approx(1 / 2)
    by_words = replace(whole, lemmatised_as_one_word=False)
    assert one(visual_qa_scores, answer, truth, quirks=by_words) == pytest.approx(1)


def test_english_stems_leave_russian_words_as_they_are() -> None:
    answer, truth = "красной собаки", ["красная собака"]
    assert one(visual_qa_scores, answer, truth, quirks=without("english_stems")) == 1


def test_synonyms_are_what_the_caller_gives() -> None:
    known = {"пёс": ["собака"]}
    found = visual_qa_scores(
        {"0": "пёс"}, {"0": ["собака"]}, synonyms=lambda word: known.get(word, [])
    )
    assert found.tolist() == [1]
    assert one(visual_qa_scores, "пёс", ["собака"]) == 0


def test_missing_answers_about_images_are_left_out() -> None:
    truths = {"0": ["кот"], "1": ["кит"]}
    plain = without("missing_not_penalised")
    assert visual_qa_scores({"1": "кит"}, truths).tolist() == [1]
    assert visual_qa_scores({"1": "кит"}, truths, plain).tolist() == [0, 1]
    cosines = {"1": 0.4}
    found = captioning_scores({"1": "кит"}, truths, cosines, NO_QUIRKS)
    assert found == pytest.approx([0, 0.7])
    assert len(captioning_scores({"1": "кит"}, truths, cosines)) == 1


def test_a_caption_is_half_meteor_half_cosine() -> None:
    truths = {"0": ["рыжий кот ест рыбу", "кот"]}
    captions, cosines = {"0": "Рыжие коты, рыбу ест."}, {"0": 0.3}
    # All four words match, in three chunks.
    expected = (1 - 0.5 * (3 / 4) ** 3 + 0.3) / 2
    assert captioning_scores(captions, truths, cosines) == pytest.approx([expected])
    plain = without("captions_penalised_for_order")
    assert captioning_scores(captions, truths, cosines, plain) == pytest.approx([1.3 / 2])
    assert captioning_scores(captions, truths, {}, plain) == pytest.approx([1 / 2])


@pytest.mark.parametrize(
    ("fid", "expected"), [(0.0, 0.65), (100.0, 0.4), (200.0, 0.15), (500.0, 0.15)]
)
def test_generation_is_half_cosine_half_fid(fid: float, expected: float) -> None:
    assert generation_score([0.2, 0.4], fid) == pytest.approx(expected)


def test_recognition_is_1_ned_of_texts_as_they_are() -> None:
    assert one(recognition_scores, "Кот", ["кот"]) == pytest.approx(2 / 3)
    assert one(recognition_scores, "котик", ["кот", "кит"]) == pytest.approx(3 / 5)
    assert one(recognition_scores, "", [""]) == 0
    assert one(recognition_scores, "", [""], quirks=without("empty_never_agrees")) == 1


def test_the_verb_scores_files_by_the_challenge_s_rules_or_plain_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"1": "шесть", "2": "b", "3": ""}
    truths = {"1": ["6", "шесть"], "2": ["a"], "3": ["-2"]}
    records = [TaskRecord(key, ("сколько?",)) for key in texts]
    write_tasks(records, tmp_path / "q.json")
    paths = [str(tmp_path / name) for name in ("q.json", "truths.json", "answers.json")]
    own = [replace(each, answer_texts=tuple(truths[each.id])) for each in records]
    write_tasks(own, paths[0], paths[1])
    write_predictions(paths[2], texts)
    for quirks, flags in ((CHALLENGE_QUIRKS, []), (NO_QUIRKS, ["--plain"])):
        assert main(["data", "fusion-brain", "math_qa", *paths, *flags]) == 0
        expected = math_qa_scores(texts, truths, quirks).mean()
        said = capsys.readouterr().out
        assert said.startswith(f"math_qa: {expected:.4f} [") and "of 3; prizes from 0.25" in said
        assert said.strip().endswith(str(quirks))
    assert main(["data", "fusion-brain", "math_qa", paths[0], "none.json", paths[2]]) == 2
    assert "none.json: no such file" in capsys.readouterr().err


def test_the_integral_is_1_when_all_is_right() -> None:
    right = dict.fromkeys(CHALLENGE_TASKS, 1.0)
    assert integral_score(right) == pytest.approx(0.4)
    assert integral_score(right, [1.0] * 6) == pytest.approx(1)
    assert integral_score(THRESHOLDS) == pytest.approx(1.18 / 15)
    with pytest.raises(ValueError, match="open_scores must be"):
        integral_score({"text_qa": 1.0})
    with pytest.raises(ValueError, match="hidden_scores must be at most 6"):
        integral_score(right, [0.0] * 7)


def test_the_quirks_are_part_of_a_measure() -> None:
    protocol = MetricProtocol("visual-qa", settings=str(without("english_stems")))
    assert MetricProtocol.parse(str(protocol)) == protocol
    assert "english_stems" not in str(protocol)
    assert str(NO_QUIRKS) == "none"
    assert str(CHALLENGE_QUIRKS).count("+") == len(fields(Quirks)) - 1
