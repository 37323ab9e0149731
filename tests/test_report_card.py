"""A run with several tasks: its report names what is scored, and the card has every evaluator."""

import json
import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from damage import copy_run
from safetensors.torch import load_file
from tiny_clip import config_for, scenes
from tiny_run import run_tiny

from rudolph.cli import main
from rudolph.data.splits import Splits
from rudolph.evaluation.context import EvaluationContext
from rudolph.evaluation.evaluators.reranking import best_probabilities
from rudolph.evaluation.evaluators.texts import answer_pairs
from rudolph.evaluation.metrics.answers import MetricProtocol, require_comparable
from rudolph.evaluation.report_card import EVALUATORS
from rudolph.families.rudolph import RudolphCapabilities
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.vision.clip import CLIP
from rudolph.reports.report import generated_part
from rudolph.reports.report_cards import card_table, export_cards, read_card
from rudolph.reports.schema import CARD
from rudolph.runs.packing import MODEL_CARD, model_card
from rudolph.runs.resolve import RUN_FILES, load_run

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
    "scene_accuracy",
    "caption_f1",
    "text_continuation",
    "shapes_questions/answer_f1",
    "words/text_recognition",
    "paragraphs/text_answers",
    "arithmetic/math_answers",
    "arithmetic/multiple_choice",
    "zero_shot_classification",
    "text_ranking",
    "image_ranking",
    "inpainting",
    "image_variation",
    "self_reranking",
    "caption_metrics",
    "fid_kid",
    "words/reconstruction",
)
NAMES = ("token_f1", "exact_match", "caption_accuracy")
SIZES = {"num_train": 20, "num_validation": 4, "num_test": 30}
WORLDS = ("shapes", "shapes_questions", "words", "paragraphs", "arithmetic")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of all tasks, at the smallest size."""
    overrides = [f"data.{name}={json.dumps(SIZES)}" for name in WORLDS]
    overrides += [
        f"data.tasks={json.dumps(TASKS)}",
        "data.image_size=48",
        "data.unknown_task_probability=0.25",
        "vqgan={resolution: 48, channels: [4, 8, 8, 8]}",
        "tokenizer.vocab_size=160",
        "layout={left_text_length: 90, right_text_length: 24}",
        "model.image_embedding_init=codebook",
        "model.losses.reduction=task",
        "optim.num_steps=12",
        f"evaluation.evaluators={json.dumps(ASKED)}",
        "evaluation.splits=[test]",
        "evaluation.grid_prompts=[]",
    ]
    return run_tiny(tmp_path_factory.mktemp("mixed"), tuple(overrides))


def test_every_question_has_its_rows_with_interval_and_protocol(mixed: Path) -> None:
    card = read_card(mixed / CARD)
    assert len(card) == len(set(card["score"])) > len(ASKED)
    assert (card["low"] <= card["value"]).all() and (card["value"] <= card["high"]).all()
    assert card["protocol"].notna().all() and (card["count"] > 0).all()
    metrics = json.loads((mixed / "summary.json").read_text())["metrics"]
    assert dict(zip(card["score"], card["value"], strict=True)) == pytest.approx(metrics)
    chances = dict(zip(card["score"], card["chance"], strict=True))
    assert chances["zero_shot_classification/accuracy/test"] == pytest.approx(1 / 35)
    assert chances["text_ranking/accuracy/test"] == chances["image_ranking/accuracy/test"] == 1 / 8
    assert "words/text_recognition/1-ned/test" in chances
    assert chances["arithmetic/math_question_answering/choice_accuracy/test"] == 1 / 3
    values = dict(zip(card["score"], card["value"], strict=True))
    assert (
        values["image_to_text/caption_accuracy/test"] >= values["image_to_text/exact_match/test"]
    )
    assert values["text_to_image/fid/test"] > 0 < chances["text_to_image/fid/test"]


def test_an_image_tokenizer_is_told_by_its_rate_and_the_use_of_its_codes(mixed: Path) -> None:
    pipeline, config = load_run(mixed)
    split = Splits(config.data, mixed.parent.parent / ".cache")("test")
    context = EvaluationContext(
        RudolphCapabilities(pipeline), config.sampling.image, config.sampling.text, 5, 0
    )
    scores = {
        score.name: score
        for name in ("likelihood", "reconstruction")
        for score in EVALUATORS[name](context, split)
    }
    # The nats of all image tokens, in bits per pixel.
    bits = scores["text_to_image/nats/test"].value * 36 / math.log(2) / 48**2
    assert scores["text_to_image/bits_per_pixel/test"].value == pytest.approx(bits)
    codes = context.image_indices(split, context.eval_indices(split)).flatten().tolist()
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    usage, perplexity = (scores[f"vqgan/codebook_{n}/test"] for n in ("usage", "perplexity"))
    assert usage.value == pytest.approx(len(shares) / 12)
    assert perplexity.value == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    assert perplexity.protocol == f"codebook sample_size={len(codes)}"


def test_scores_of_a_clip_need_one_and_say_which(mixed: Path, tmp_path: Path) -> None:
    pipeline, config = load_run(mixed)
    split = Splits(config.data, mixed.parent.parent / ".cache")("test")
    context = EvaluationContext(
        RudolphCapabilities(pipeline), config.sampling.image, config.sampling.text, 4, 0
    )
    with pytest.raises(ValueError, match=r"evaluation\.clip: expected a CLIP"):
        EVALUATORS["clip_score"](context, split)
    [fid, _] = EVALUATORS["fid_kid"](context, split)
    _, tokenizer = scenes(tmp_path)
    torch.manual_seed(0)
    ranker = ClipRanker(CLIP(config_for(tokenizer)), tokenizer, templates=("{}",))
    context = replace(context, ranker=ranker)
    drawn, real = EVALUATORS["clip_score"](context, split)
    # The oracle uses the ranker's own similarity of each caption to its own image.
    indices = context.eval_indices(split)
    captions = [split.captions[index] for index in indices]
    for score, images in (
        (drawn, context.generated_images(split, indices)),
        (real, split.image_batch(indices)),
    ):
        cosines = ranker.similarities(images, captions).diagonal()
        assert score.value == pytest.approx(float(2.5 * cosines.clamp(min=0).mean()), rel=1e-5)
    [by_clip, _] = EVALUATORS["fid_kid"](context, split)
    first, second = (MetricProtocol.parse(each.protocol) for each in (fid, by_clip))
    with pytest.raises(ValueError, match=r"not comparable: features vqgan-.* and clip-"):
        require_comparable(first, second)


def test_answers_after_a_drawn_image_are_another_measure(mixed: Path) -> None:
    pipeline, config = load_run(mixed)
    split = Splits(config.data, mixed.parent.parent / ".cache")("test", "paragraphs")
    sampling = TokenSamplingConfig()
    context = EvaluationContext(RudolphCapabilities(pipeline), sampling, sampling, 12, 0)
    legacy = replace(context, missing_image="legacy")
    asked = [answer_pairs("text_question_answering", each, split) for each in (context, legacy)]
    assert asked[0].indices == asked[1].indices and asked[0].answers != asked[1].answers
    plain, after = (EVALUATORS["text_answers"](each, split)[0] for each in (context, legacy))
    with pytest.raises(ValueError, match="settings None and after-a-generated-image"):
        require_comparable(*(MetricProtocol.parse(each.protocol) for each in (plain, after)))


def test_a_trained_decoder_is_asked_more_without_training(mixed: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((mixed / "config.yaml").read_text())
    kept = ("data", "layout", "tokenizer", "vqgan", "model")
    overrides = [f"{name}={json.dumps(settings[name])}" for name in kept]
    overrides += [f"{name}.init={mixed}" for name in ("vqgan", "model")]
    overrides += [
        f"tokenizer.path={mixed}",
        "optim.num_steps=0",
        "evaluation.evaluators=[caption_f1]",
        "evaluation.splits=[test]",
        "evaluation.grid_prompts=[]",
    ]
    again = run_tiny(tmp_path, tuple(overrides))
    before, after = (read_card(run / CARD).set_index("score")["value"] for run in (mixed, again))
    assert set(after.index) == {f"image_to_text/{name}/test" for name in NAMES}
    assert after.to_dict() == before[after.index].to_dict()
    decoders = [load_run(run)[0].decoder.state_dict() for run in (mixed, again)]
    assert all((value == decoders[1][name]).all() for name, value in decoders[0].items())


def test_a_packed_run_is_small_draws_and_has_its_card(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pack", str(mixed), "packed"]) == 0
    packed = Path("packed")
    (packed / MODEL_CARD).write_text("# Mine\n\nBy hand.\n")
    assert main(["pack", str(mixed), "packed"]) == 0
    text = (packed / MODEL_CARD).read_text()
    assert text.startswith("# Mine\n\nBy hand.\n") and text.count("16 bits") == 1
    assert generated_part(packed / MODEL_CARD) == model_card(packed)
    values = read_card(packed / CARD).set_index("score")["value"]
    score = "image_to_text/token_f1/test"
    assert f"| {score} | {values[score]:.3g} |" in text
    for name in RUN_FILES[:2]:
        half, whole = (run / "checkpoints" / name for run in (packed, mixed))
        assert half.stat().st_size < 0.7 * whole.stat().st_size
        tensors, truth = load_file(half), load_file(whole)
        for key, value in truth.items():
            torch.testing.assert_close(tensors[key].float(), value.float(), rtol=1e-3, atol=1e-6)
    assert main(["pack", str(mixed), "small", "--int8", "sampling.image.temperature=0.3"]) == 0
    assert load_run(Path("small"))[1].sampling.image.temperature == 0.3
    assert main(["pack", str(mixed), "other", "model.num_layers=9"]) == 2
    assert not Path("other").exists()
    sizes = [
        Path(each, "checkpoints", RUN_FILES[0]).stat().st_size for each in ("small", "packed")
    ]
    assert sizes[0] < sizes[1] and "decoder 8 bits" in Path("small", MODEL_CARD).read_text(
        encoding="utf-8"
    )
    whole, rounded = (load_run(run)[0].decoder.state_dict() for run in (mixed, Path("small")))
    for key, value in whole.items():
        # At most half a step of a row's 127 levels; tensors that are no matrices stay unchanged.
        step = value.abs().amax(-1, keepdim=True) / 127 if value.ndim == 2 else 0 * value
        assert ((rounded[key] - value).abs() <= 0.5001 * step).all(), key
    argv = ["generate", "круг", "-n", "2", "--model"]
    assert main([*argv, "small"]) == main([*argv, "packed"]) == 0
    assert len(Path("generated.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_what_cannot_be_packed_is_told(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(tmp_path), str(tmp_path / "packed")]) == 2
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_bytes((mixed / "config.yaml").read_bytes())
    assert main(["pack", str(unfinished), str(tmp_path / "packed")]) == 2
    assert "expected a finished run, got no summary.json" in capsys.readouterr().err
    shutil.copyfile(mixed / "environment.json", unfinished / "environment.json")
    summary = json.loads((mixed / "summary.json").read_text()) | {"status": "failed"}
    (unfinished / "summary.json").write_text(json.dumps(summary))
    assert main(["pack", str(unfinished), str(tmp_path / "packed")]) == 2
    assert "expected a finished run, got status failed" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(mixed, broken)
    (broken / "checkpoints" / RUN_FILES[0]).write_bytes(b"cut off")
    assert main(["pack", str(broken), str(tmp_path / "packed")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{RUN_FILES[0]}: damaged (not a complete safetensors" in line
    assert not (tmp_path / "packed").exists()


def test_a_run_is_packed_into_no_run_and_whole_or_not_at_all(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run, other = (copy_run(mixed, tmp_path / "runs" / name) for name in ("run", "other"))
    Path("linked").symlink_to(run)
    weights = {path: path.read_bytes() for path in Path("runs").rglob("*.safetensors")}
    for target, words in (
        ("runs/run", "folder: expected a path apart from"),
        ("linked", "folder: expected a path apart from"),
        ("runs/run/packed", "which lies in it"),
        ("runs/other/../../runs", "which contains it"),
        ("runs/other", "got runs/other, a run without made.json. Give another path"),
    ):
        assert main(["pack", "runs/run", target, "--int8"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("rudolph: folder: expected a ") and words in line
    assert {path: path.read_bytes() for path in Path("runs").rglob("*.safetensors")} == weights
    assert main(["pack", "runs/run", "packed"]) == 0
    before = {path: path.read_bytes() for path in Path("packed").rglob("*") if path.is_file()}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rudolph.runs.packing.evaluate_again", interrupted)
    assert main(["pack", str(other), "packed", "--int8"]) == 130
    files = {path: path.read_bytes() for path in Path("packed").rglob("*") if path.is_file()}
    assert files == before
    assert not list(tmp_path.glob(".*"))


def test_what_is_scored_is_told_and_what_was_seen_is_logged(mixed: Path) -> None:
    table = pd.read_csv(mixed / "scored.csv").set_index("source")
    assert list(table.index) == list(TASKS)
    assert table["share"].sum() == pytest.approx(1)
    assert table.loc["text_to_image"].tolist()[1:] == [1, 7, 0]
    assert table.loc["words/text_recognition"].tolist()[1:] == [0, 0, 1]
    logged: dict[str, float] = {}
    [path] = mixed.parent.parent.glob(".cache/decoder-*/curves.jsonl")
    for line in path.read_text().splitlines():
        logged |= json.loads(line)[1]
    shares = [logged[f"decoder/train/fraction/{name}"] for name in TASKS]
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
    card.loc[card["score"] == "text_ranking/accuracy/test", "protocol"] = "accuracy settings=x"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_bytes((mixed / "config.yaml").read_bytes())
    card.to_csv(other / CARD, index=False)
    assert main(["report-card", str(mixed), str(other)]) == 2
    assert "text_ranking/accuracy/test: values are not comparable" in capsys.readouterr().err
    (other / CARD).write_bytes((mixed / CARD).read_bytes())
    environment = json.loads((mixed / "environment.json").read_text())
    environment["digests"]["data.train"] = "learned from something else"
    (other / "environment.json").write_text(json.dumps(environment))
    assert main(["report-card", str(mixed), str(other)]) == 0
    environment["digests"]["data.test.words"] = "asked about something else"
    (other / "environment.json").write_text(json.dumps(environment))
    assert main(["report-card", str(mixed), str(other)]) == 2
    assert (
        "got different data.test.words. The scores are not comparable" in capsys.readouterr().err
    )


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
    assert values @ best_probabilities(total, number) == pytest.approx(sum(best) / len(best))


def test_reranking_tells_a_point_for_each_ranking_and_number(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rudolph.evaluation.evaluators.reranking.CANDIDATE_COUNTS", (1, 2, 4))
    pipeline, config = load_run(mixed)
    split = Splits(config.data, mixed.parent.parent / ".cache")("test")
    context = EvaluationContext(
        RudolphCapabilities(pipeline), config.sampling.image, config.sampling.text, 3, 0
    )
    scores = {score.metric: score for score in EVALUATORS["rerank_curve"](context, split)}
    rankings = ("likelihood", "inverse_prompting", "oracle")
    points = [f"best_of_{n}" for n in (1, 2, 4)] + [f"gain_at_{n}" for n in (2, 4)]
    assert set(scores) == {f"rerank_{name}/{point}" for name in rankings for point in points}
    first = [scores[f"rerank_{name}/best_of_1"].value for name in rankings]
    assert first == pytest.approx([first[0]] * 3) and first[0] == pytest.approx(
        scores["rerank_oracle/best_of_1"].chance
    )
    truth = [scores[f"rerank_oracle/best_of_{number}"].value for number in (1, 2, 4)]
    gains = [scores[f"rerank_oracle/gain_at_{number}"].value for number in (2, 4)]
    assert gains == pytest.approx([truth[1] - truth[0], truth[2] - truth[1]])
    assert truth == sorted(truth)


def test_the_share_of_different_captions_is_told_where_there_are_two(mixed: Path) -> None:
    pipeline, config = load_run(mixed)
    split = Splits(config.data, mixed.parent.parent / ".cache")("test")
    sampling = TokenSamplingConfig(temperature=2.0)
    for number in (1, 6):
        context = EvaluationContext(RudolphCapabilities(pipeline), sampling, sampling, number, 0)
        scores = {score.metric: score for score in EVALUATORS["caption_metrics"](context, split)}
        assert ("image_to_text/distinct" in scores) == (number > 1)
    said = answer_pairs("image_captioning", context, split).answers
    assert scores["image_to_text/distinct"].value == len(set(said)) / 6
