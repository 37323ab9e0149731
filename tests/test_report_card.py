"""One run of several tasks: what is scored is told, every question has its row on the card."""

import json
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_run import run_tiny

from rudolph.cli import main
from rudolph.data.splits import Splits
from rudolph.evaluation.asking import Subject
from rudolph.evaluation.report_card import QUESTIONS
from rudolph.evaluation.reranking import first_shares
from rudolph.results.cards import CARD, card_table, export_cards, read_card
from rudolph.sources import load_run

TASKS = {
    "text_to_image": 1.0,
    "image_captioning": 1.0,
    "text_to_text": 0.5,
    "shapes_questions/question_answering": 1.0,
    "words/text_recognition": 1.0,
    "paragraphs/text_question_answering": 1.0,
    "arithmetic/math_question_answering": 1.0,
}
ASKED = (
    "scene_right",
    "caption_f1",
    "continuation",
    "shapes_questions/answer_f1",
    "words/recognition",
    "paragraphs/text_answers",
    "arithmetic/math_answers",
    "zero_shot",
    "text_ranking",
    "image_ranking",
    "inpainting",
    "image_variation",
    "self_reranking",
    "words/reconstruction",
)
SIZES = {"num_train": 20, "num_validation": 4, "num_test": 30}
WORLDS = ("shapes", "shapes_questions", "words", "paragraphs", "arithmetic")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all tasks, the smallest there is."""
    overrides = [f"data.{name}={json.dumps(SIZES)}" for name in WORLDS]
    overrides += [
        f"data.tasks={json.dumps(TASKS)}",
        "data.image_size=48",
        "data.unknown_task_share=0.25",
        "vqgan={resolution: 48, channels: [4, 8, 8, 8]}",
        "tokenizer.vocab_size=160",
        "layout={left_text_length: 90, right_text_length: 24}",
        "decoder_losses.average=task",
        "decoder_optim.num_steps=12",
        f"evaluation.questions={json.dumps(ASKED)}",
        "evaluation.splits=[test]",
        "evaluation.grid_prompts=[]",
    ]
    return run_tiny(tmp_path_factory.mktemp("mixed"), tuple(overrides))


def test_every_question_has_its_rows_with_interval_and_protocol(mixed: Path) -> None:
    card = read_card(mixed / CARD)
    assert len(card) == len(set(card["score"])) > len(ASKED)
    assert (card["low"] <= card["value"]).all() and (card["value"] <= card["high"]).all()
    assert card["measure"].notna().all() and (card["count"] > 0).all()
    metrics = json.loads((mixed / "summary.json").read_text())["metrics"]
    assert dict(zip(card["score"], card["value"], strict=True)) == pytest.approx(metrics)
    chances = dict(zip(card["score"], card["chance"], strict=True))
    assert chances["zero_shot_classification/accuracy/test"] == pytest.approx(1 / 35)
    assert chances["text_ranking/accuracy/test"] == chances["image_ranking/accuracy/test"] == 1 / 8
    assert "words/text_recognition/1-ned/test" in chances


def test_what_is_scored_is_told_and_what_was_seen_is_logged(mixed: Path) -> None:
    table = pd.read_csv(mixed / "scored.csv").set_index("source")
    assert list(table.index) == list(TASKS)
    assert table["share"].sum() == pytest.approx(1)
    assert table.loc["text_to_image"].tolist()[1:] == [1, 7, 0]
    assert table.loc["words/text_recognition"].tolist()[1:] == [0, 0, 1]
    logged: dict[str, float] = {}
    for line in (mixed / "checkpoints" / "curves.jsonl").read_text().splitlines():
        logged |= json.loads(line)[1]
    shares = [logged[f"decoder/train/share/{name}"] for name in TASKS]
    assert sum(shares) == pytest.approx(1)
    assert logged["decoder/val/loss/words/text_recognition/right_text"] > 0


def test_a_card_is_asked_again_and_compared_with_another(
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (mixed / CARD).read_bytes()
    assert main(["report-card", str(mixed), "--again"]) == 0
    assert (mixed / CARD).read_bytes() == before
    assert (mixed / CARD).with_suffix(".svg").is_file()
    assert main(["report-card", str(mixed), str(mixed)]) == 0
    lines = capsys.readouterr().err.splitlines()
    [line] = [each for each in lines if each.count(" of 4") == 2 and "text_ranking" in each]
    assert line.split()[1] == line.split()[7] or "chance 0.125" in line
    card = pd.read_csv(mixed / CARD)
    card.loc[card["score"] == "text_ranking/accuracy/test", "measure"] = "accuracy settings=x"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_bytes((mixed / "config.yaml").read_bytes())
    card.to_csv(other / CARD, index=False)
    assert main(["report-card", str(mixed), str(other)]) == 2
    assert "text_ranking/accuracy/test: values are not comparable" in capsys.readouterr().err


def test_cards_of_several_runs_are_one_file_and_one_table(mixed: Path, tmp_path: Path) -> None:
    export_cards({"b": mixed, "a": mixed, "none": tmp_path}, tmp_path)
    whole = read_card(tmp_path / CARD)
    assert list(whole["run"].unique()) == ["a", "b"]
    lines = card_table(whole, ["text_ranking/accuracy/test", "words/vqgan/psnr/test"])
    assert len(lines) == 2 + 4 and lines[2].startswith("| a | text_ranking/accuracy/test |")
    export_cards({"none": tmp_path / "nothing"}, tmp_path)
    assert not (tmp_path / CARD).exists()


@pytest.mark.parametrize(("total", "number"), [(5, 1), (5, 3), (5, 5), (7, 2)])
def test_the_best_of_some_is_the_mean_over_all_choices(total: int, number: int) -> None:
    values = torch.arange(total).flip(0).double().numpy()
    best = [values[list(chosen)].max() for chosen in combinations(range(total), number)]
    assert values @ first_shares(total, number) == pytest.approx(sum(best) / len(best))


def test_reranking_tells_a_point_for_each_ranking_and_number(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rudolph.evaluation.reranking.NUMBERS", (1, 2, 4))
    pipeline, config = load_run(mixed)
    split = Splits(config.data, mixed.parent.parent / ".cache")("test")
    subject = Subject(pipeline, config.sampling.image, config.sampling.text, 3, 0)
    scores = {score.metric: score for score in QUESTIONS["rerank_curve"](subject, split)}
    rankings = ("likelihood", "inverse_prompting", "truth")
    assert set(scores) == {f"rerank_{name}/best_of_{n}" for name in rankings for n in (1, 2, 4)}
    first = [scores[f"rerank_{name}/best_of_1"].value for name in rankings]
    assert first == pytest.approx([first[0]] * 3) and first[0] == pytest.approx(
        scores["rerank_truth/best_of_1"].chance
    )
    truth = [scores[f"rerank_truth/best_of_{number}"].value for number in (1, 2, 4)]
    assert truth == sorted(truth)
