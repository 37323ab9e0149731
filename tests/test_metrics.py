"""Metrics: computed by hand, and by brute force from their definitions."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rudolph.evaluation.metrics.answers import (
    MetricProtocol,
    accuracy,
    calibration_error,
    choice_hits,
    chosen_option,
    exact_match,
    max_over_references,
    require_comparable,
    token_f1,
    vqa_accuracy,
)
from rudolph.evaluation.metrics.texts import (
    ANSWER,
    Normalization,
    character_edits,
    edit_similarity,
    normalize_text,
    word_edits,
)
from rudolph.evaluation.statistics import (
    bootstrap_interval,
    jackknife_interval,
    mean_interval,
    student_quantile,
)

TEXTS = st.text(alphabet="абвё АБ.-«x1", max_size=12)


def distance_by_table(one: str, other: str) -> int:
    """Compute Levenshtein's distance by his recursion."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, against in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != against))
    return row[-1]


@pytest.mark.parametrize(
    "protocol",
    [
        MetricProtocol("accuracy"),
        MetricProtocol("fid", features="inception-v3:pool3", sample_size=5000),
        MetricProtocol(
            "meteor-nltk", tokenization="words", normalization=str(ANSWER), settings="gamma:0"
        ),
    ],
)
def test_a_measure_is_read_from_its_line(protocol: MetricProtocol) -> None:
    assert MetricProtocol.parse(str(protocol)) == protocol
    assert not set(str(protocol)) & set(",;\"'\n")


def test_values_of_different_protocols_are_not_comparable() -> None:
    first = MetricProtocol("fid", features="clip", sample_size=100)
    require_comparable(first, MetricProtocol("fid", features="clip", sample_size=100))
    with pytest.raises(ValueError, match="not comparable: sample_size 100 and 200"):
        require_comparable(first, MetricProtocol("fid", features="clip", sample_size=200))


@pytest.mark.parametrize(
    "line", ["fid seed=1", "fid sample_size=x", "fid sample_size=0", "", "a "]
)
def test_a_broken_line_is_no_measure(line: str) -> None:
    with pytest.raises(ValueError, match=r"must be|a metric protocol"):
        MetricProtocol.parse(line)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        (Normalization(), " Ёж,  два-три  «Кота»… "),
        (Normalization(lower=True), " ёж,  два-три  «кота»… "),
        (Normalization(punctuation="ascii"), " Ёж  дватри  «Кота»… "),
        (Normalization(punctuation="ascii_but_hyphen", squeeze=True), "Ёж два-три «Кота»…"),
        (Normalization(punctuation="russian", fold_yo=True, squeeze=True), "Еж дватри Кота"),
    ],
)
def test_each_option_of_a_normalization_does_what_it_says(
    normalization: Normalization, expected: str
) -> None:
    assert normalize_text(" Ёж,  два-три  «Кота»… ", normalization) == expected


def test_lemmas_digits_and_composed_letters() -> None:
    lemmas = Normalization(lower=True, lemmas=True, digits=True)
    assert normalize_text("Две красные собаки", lemmas) == "2 красный собака"
    assert normalize_text("зеленыи\u0306", Normalization(nfc=True)) == "зеленый"
    assert str(lemmas) == "lower+lemmas+digits"
    assert str(Normalization()) == "raw"
    with pytest.raises(ValueError, match="punctuation must be of kept, ascii"):
        Normalization(punctuation="all")


@given(TEXTS, TEXTS)
def test_token_f1_is_that_of_squad_without_articles(one: str, other: str) -> None:
    removed = str.maketrans("", "", r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~«»—–…""")
    bags = [
        Counter(re.split(r"\s+", text.lower().translate(removed).strip())) for text in (one, other)
    ]
    common = (bags[0] & bags[1]).total()
    expected = 0.0
    if common:
        precision, recall = common / bags[0].total(), common / bags[1].total()
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(one, other) == pytest.approx(expected)
    if exact_match(one, other):
        assert token_f1(one, other) == 1


def test_the_best_of_several_truths_counts() -> None:
    assert max_over_references(token_f1, "синий шар", ["шар", "красный куб"]) == pytest.approx(
        2 / 3
    )
    with pytest.raises(ValueError, match="at least one truth"):
        max_over_references(token_f1, "шар", [])


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_of_ten_answers_is_the_published_one(agreeing: int, expected: float) -> None:
    answers = ["Зелёный."] * agreeing + ["синий"] * (10 - agreeing)
    assert vqa_accuracy("зеленый", answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from("абв"), min_size=2, max_size=12))
def test_vqa_accuracy_is_the_mean_over_sets_without_one(answers: list[str]) -> None:
    sets = itertools.combinations(answers, len(answers) - 1)
    shares = [min(1.0, rest.count("а") / 3) for rest in sets]
    assert vqa_accuracy("а", answers) == pytest.approx(sum(shares) / len(shares))


def test_one_answer_leaves_none_to_compare_with() -> None:
    with pytest.raises(ValueError, match="answers must be at least 2, got 1"):
        vqa_accuracy("а", ["а"])


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("Олень!", 1),
        ("б", 1),
        ("(B) deer", 1),
        ("В: волк", 2),
        ("в лесу", None),
        ("г)", None),
        ("", None),
        ("медведь", None),
    ],
)
def test_an_option_is_named_by_its_words_or_its_letter(said: str, option: int | None) -> None:
    assert chosen_option(said, ["лиса", "олень", "волк"]) == option


def test_an_option_given_twice_is_not_chosen() -> None:
    assert chosen_option("лиса", ["лиса", "Лиса"]) is None


def test_options_that_tie_share_the_hit() -> None:
    scores = np.array([[0.0, 1.0, -np.inf], [2.0, 2.0, 1.0], [5.0, 5.0, 5.0], [3.0, 1.0, 0.0]])
    found = choice_hits(scores, np.array([1, 0, 2, 1]))
    assert found == pytest.approx([1, 1 / 2, 1 / 3, 0])


def test_accuracy_has_wilsons_interval() -> None:
    found = accuracy(["а", "б", "в", "г"], ["а", "б", "в", "д"])
    assert found.value == 0.75
    assert 0 < found.low < 0.75 < found.high < 1
    with pytest.raises(ValueError, match="got 1 predictions for 2 truths"):
        accuracy([1], [1, 2])


@given(TEXTS, TEXTS)
def test_edits_are_those_of_levenshteins_table(one: str, other: str) -> None:
    counts = character_edits([one], [other], Normalization())
    distance = distance_by_table(one, other)
    assert (counts.edits.tolist(), counts.lengths.tolist()) == ([distance], [len(other)])
    longer = max(len(one), len(other))
    similarity = edit_similarity(one, other, Normalization())
    assert similarity == pytest.approx(1 - distance / longer if longer else 1)
    assert similarity == edit_similarity(other, one, Normalization())


def test_error_rates_worked_by_hand() -> None:
    truths = ["кот", "мама мыла раму"]
    predictions = ["кит", "мама раму  мыла"]
    characters = character_edits(predictions, truths)
    assert characters.rate() == pytest.approx((1 + characters.edits[1]) / 17)
    assert characters.rate(np.array([0, 0])) == pytest.approx(1 / 3)
    found = word_edits(predictions, truths)
    assert (found.edits.tolist(), found.lengths.tolist()) == ([1, 2], [1, 3])
    assert found.rate() == 0.75
    # A rate may exceed 1, and it is not the mean of 2 / 1 and 0 / 3.
    assert word_edits(["а б в", "г д е"], ["а", "г д е"]).rate() == 0.5
    assert word_edits(["а б в"], ["а"]).rate() == 2


def test_a_rate_of_empty_truths_is_told() -> None:
    with pytest.raises(ValueError, match="not empty"):
        character_edits(["а"], [""]).rate()
    with pytest.raises(ValueError, match="got 1 predictions for 2 truths"):
        word_edits(["а"], ["а", "б"])


def test_calibration_error_worked_by_hand() -> None:
    # Bins (0.2, 0.4] and (0.8, 1]: |1 - 0.3| * 1 / 4 and |1 / 3 - 0.9| * 3 / 4.
    confidences, hits = np.array([0.3, 0.9, 0.85, 0.95]), np.array([1, 1, 0, 0])
    expected = 0.7 / 4 + 3 / 4 * abs(1 / 3 - 0.9)
    assert calibration_error(confidences, hits, num_bins=5) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_error_is_that_of_its_bins(pairs: list[tuple[float, bool]]) -> None:
    confidences, hits = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    expected = 0.0
    for k in range(4):
        inside = (confidences > k / 4) & (confidences <= (k + 1) / 4) | (
            (k == 0) & (confidences == 0)
        )
        if inside.any():
            gap = abs(hits[inside].mean() - confidences[inside].mean())
            expected += inside.mean() * gap
    assert calibration_error(confidences, hits, num_bins=4) == pytest.approx(expected)


def test_calibration_needs_probabilities() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration_error(np.array([1.5]), np.array([1]))
    with pytest.raises(ValueError, match="got 0 confidences"):
        calibration_error(np.array([]), np.array([]))


def test_a_jackknifed_mean_has_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=13)
    found = jackknife_interval(lambda chosen: values[chosen].mean(), 13)
    half = student_quantile(12) * values.std(ddof=1) / math.sqrt(13)
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    # With three groups of three, the jackknife leaves out one group mean at a time.
    means = values[:9].reshape(3, 3).mean(0)
    found = jackknife_interval(lambda chosen: values[chosen].mean(), 9, groups=3)
    half = student_quantile(2) * means.std(ddof=1) / math.sqrt(3)
    assert found.high - found.value == pytest.approx(half)
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        jackknife_interval(lambda chosen: 0.0, 1)
    with pytest.raises(ValueError, match="finite"):
        jackknife_interval(lambda chosen: math.inf, 3)


def test_a_resampled_mean_has_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(5).exponential(size=40)
    found = bootstrap_interval(lambda chosen: values[chosen].mean(), 40, seed=3)
    expected = mean_interval(values, seed=4)
    assert found.value == pytest.approx(expected.value)
    assert found == pytest.approx(expected, abs=0.05)


def test_an_error_rate_has_an_interval() -> None:
    truths = ["мама мыла раму", "кот", "синий шар", "ёж", "дом у моря"] * 6
    predictions = ["мама мыла рану", "кит", "синий шар", "ежи", "дом у мора"] * 6
    edits = character_edits(predictions, truths)
    rate = bootstrap_interval(edits.rate, 30, seed=0)
    assert rate.low < rate.value == edits.rate() < rate.high


def test_a_statistic_that_is_not_finite_has_no_interval() -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(lambda chosen: math.nan, 3, seed=0)
    with pytest.raises(ValueError, match="at least one example"):
        bootstrap_interval(lambda chosen: 0.0, 0, seed=0)
