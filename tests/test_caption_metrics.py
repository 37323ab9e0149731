"""Caption metrics: values computed by hand, other implementations, and invariants."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu

from rudolph.evaluation.metrics.captions import (
    bleu_counts,
    caption_words,
    cider_d,
    clip_score,
    meteor,
    reference_clip_score,
    rouge_l,
)
from rudolph.evaluation.statistics import bootstrap_interval

WORDS = ["кот", "кит", "дом", "ест", "спит"]
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=4, max_size=9).map(" ".join)
CATS = "the the the the the the the"
ON_THE_MAT = ["the cat is on the mat", "there is a cat on the mat"]


def test_bleu_of_the_papers_example() -> None:
    # Papineni 2002: two of seven "the" match, and the brevity penalty is 1.
    counts = bleu_counts([CATS], [ON_THE_MAT])
    assert counts.bleu().tolist() == pytest.approx([2 / 7, 0, 0, 0])


def test_bleu_worked_by_hand() -> None:
    # Hypotheses have 5 and 3 words, references 6 and 3: brevity exp(1 - 9 / 8).
    counts = bleu_counts(
        ["the cat sat on mat", "a dog runs"], [["the cat sat on the mat"], ["the dog runs"]]
    )
    precisions = [7 / 8, 4 / 6, 2 / 4, 1 / 2]
    expected = [math.exp(-1 / 8) * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]
    assert counts.bleu() == pytest.approx(expected)


@given(st.lists(st.tuples(SENTENCES, SENTENCES, SENTENCES), min_size=1, max_size=4))
def test_bleu_is_nltks_where_captions_are_long_enough(corpus: list[tuple[str, str, str]]) -> None:
    captions, references = [row[0] for row in corpus], [row[1:] for row in corpus]
    ours = bleu_counts(captions, references).bleu()
    for n in range(1, 5):
        if ours[n - 1] > 0:
            tokens = [[other.split() for other in others] for others in references]
            said = [caption.split() for caption in captions]
            assert ours[n - 1] == pytest.approx(corpus_bleu(tokens, said, weights=[1 / n] * n))


def test_rouge_l_worked_by_hand() -> None:
    # Lin 2004: "police kill the gunman" has 2 of its 4 words in the reference's order.
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    # Precision 2 / 2 against one reference, recall 1 / 1 against the other.
    assert rouge_l("кот ест", ["кот ест рыбу", "кот"]) == pytest.approx(1.0)
    precision, recall = 2 / 4, 2 / 3
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert rouge_l("кот и кит ест", ["кот ест рыбу"]) == pytest.approx(expected)
    assert rouge_l("", ["кот"]) == 0


def test_meteor_of_nltks_example() -> None:
    # Example in the documentation of nltk.translate.meteor_score; no word needs a synonym.
    hypothesis = (
        "It is a guide to action which ensures that the military always obeys the commands of "
        "the party"
    )
    reference = (
        "It is a guide to action that ensures that the military will forever heed Party commands"
    )
    assert meteor(hypothesis, [reference]) == pytest.approx(0.6944, abs=5e-5)
    assert meteor("non matching hypothesis", ["this is a cat"]) == 0
    # The match has 12 words, of 18 and of 16, in 6 chunks.
    f = 10 * (2 / 3) * (3 / 4) / (3 / 4 + 9 * (2 / 3))
    assert meteor(hypothesis, [reference], gamma=0) == pytest.approx(f)
    assert meteor(hypothesis, [reference]) == pytest.approx(f * (1 - 0.5 * (6 / 12) ** 3))


def test_meteor_matches_russian_stems_and_synonyms_that_are_given() -> None:
    assert meteor("красных собаки", ["красная собака"], gamma=0) == pytest.approx(1)
    assert meteor("пёс", ["собака"], gamma=0) == 0
    assert meteor("пёс", ["собака"], gamma=0, synonyms=lambda stem: ["собак"]) == 1


@pytest.mark.parametrize("metric", [rouge_l, meteor])
def test_a_caption_needs_a_reference(metric) -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        metric("кот", [])


def test_cider_d_worked_by_hand() -> None:
    # Every n-gram is in one of two images: all have weight ln 2, which the cosine cancels.
    found = cider_d(["a b", "c"], [["a b"], ["c d"]])
    assert found[0] == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)
    assert found[1] == pytest.approx(10 * (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))
    # Clipping: a has weight 2 against 1, min(2, 1) * 1 / (2 * sqrt 2).
    assert cider_d(["a a", "c d"], [["a b"], ["c d"]])[0] == pytest.approx(10 / (8 * math.sqrt(2)))
    # "a" is in both images, so its weight is 0.
    assert cider_d(["a", "a"], [["a b"], ["a c"]]).tolist() == [0, 0]


def test_cider_d_of_one_image_is_zero() -> None:
    assert cider_d(["кот ест рыбу"], [["кот ест рыбу"]]).tolist() == [0]
    with pytest.raises(ValueError, match="got 2 lists of references for 1 captions"):
        cider_d(["кот"], [["кот"], ["кит"]])


@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=2, max_size=4))
@settings(deadline=None)
def test_caption_metrics_keep_their_bounds(corpus: list[tuple[str, str]]) -> None:
    captions, references = [row[0] for row in corpus], [[row[1]] for row in corpus]
    for caption, others in zip(captions, references, strict=True):
        for metric in (rouge_l, meteor):
            assert 0 <= metric(caption, others) <= 1
        assert rouge_l(caption, [caption]) == pytest.approx(1)
        assert meteor(caption, [caption], gamma=0) == pytest.approx(1)
    assert ((cider_d(captions, references) >= 0) & (cider_d(captions, references) < 10.01)).all()
    assert bleu_counts(captions, [[caption] for caption in captions]).bleu() == pytest.approx(1)
    bleu = bleu_counts(captions, references).bleu()
    assert ((bleu >= 0) & (bleu <= 1)).all()


def test_words_keep_inner_hyphens_alone() -> None:
    assert caption_words("— Тёмно-красный, ёж!") == ["тёмно-красный", "ёж"]


def test_clip_scores_worked_by_hand() -> None:
    captions = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    images = np.array([[3.0, 4.0], [0.0, -1.0], [1.0, 0.0]])
    references = [np.array([[0.0, 1.0], [4.0, 3.0]]), np.array([[0.0, 1.0]]), -captions[:1]]
    assert clip_score(captions, images) == pytest.approx([1.5, 0, 2.5])
    found = reference_clip_score(captions, images, references)
    assert found == pytest.approx([2 * 1.5 * 0.8 / (1.5 + 0.8), 0, 0])


def test_bleu_of_a_corpus_has_an_interval() -> None:
    truths = ["мама мыла раму", "кот", "синий шар", "ёж", "дом у моря"] * 6
    captions = ["мама мыла рану", "кит", "синий шар", "ежи", "дом у мора"] * 6
    counts = bleu_counts(captions, [[truth] for truth in truths])
    found = bootstrap_interval(lambda chosen: counts.bleu(chosen)[0], 30, seed=0)
    assert found.low < found.value == counts.bleu()[0] < found.high
