"""Questions about images: read from every format, put on the left, answered on the right."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from rudolph.cli import main
from rudolph.data.datasets.emoji import write_emoji_tables
from rudolph.data.datasets.manifests import Manifest
from rudolph.data.datasets.tables import ManifestConfig, read_rows
from rudolph.data.examples import task_texts
from rudolph.data.splits import DataConfig, Split
from rudolph.sequence.layout import EOS, SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer

COLOURS = {"red": "красный", "blue": "синий", "green": "зелёный"}


def write_questions(folder: Path, number: int = 60) -> list[dict[str, str]]:
    """Write different images of one colour, each with a question and its answer."""
    rows = []
    for at in range(number):
        name = list(COLOURS)[at % 3]
        image = Image.new("RGB", (8, 8), name)
        image.putpixel((at % 8, at // 8), (at, at, at))
        image.save(folder / f"{at}.png")
        question = "какой цвет?" if at % 2 else "цвет фона?"
        rows.append({"image": f"{at}.png", "caption": COLOURS[name], "question": question})
    return rows


def write_table(folder: Path, rows: list[dict[str, str]], kind: str) -> ManifestConfig:
    table = pd.DataFrame(rows)
    path = folder / f"table.{kind}"
    if kind == "json":
        asked = {
            str(at): [
                {"type": "text", "content": row["question"]},
                {"type": "image", "content": row["image"]},
            ]
            for at, row in enumerate(rows)
        }
        told = {
            str(at): [{"type": "text", "content": row["caption"]}] for at, row in enumerate(rows)
        }
        path.write_text(json.dumps(asked, ensure_ascii=False))
        (folder / "told.json").write_text(json.dumps(told, ensure_ascii=False))
        return ManifestConfig(str(path), answers=str(folder / "told.json"))
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return ManifestConfig(str(path), question_column="question")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "json"])
def test_every_format_gives_the_same_questions(tmp_path: Path, kind: str) -> None:
    rows = write_questions(tmp_path)
    config = write_table(tmp_path, rows, kind)
    found = [
        (row.image, row.caption, row.question) for row in read_rows(Path(config.path), config)
    ]
    assert found == [(row["image"], row["caption"], row["question"]) for row in rows]
    pairs = Manifest(config, split="train", image_size=8)
    assert {pair.question for pair in map(pairs.__getitem__, range(len(pairs)))} == {
        "какой цвет?",
        "цвет фона?",
    }


def test_a_question_stands_left_and_its_answer_right(tmp_path: Path) -> None:
    config = write_table(tmp_path, write_questions(tmp_path), "csv")
    split = Split(
        DataConfig("manifest", 8, {"question_answering": 1.0}, manifest=config),
        "train",
        tmp_path / "cache",
    )
    texts = [*split.captions, *split.questions]
    tokenizer = Tokenizer.train(texts, vocab_size=80, path=tmp_path / "bpe.model")
    layout, vocabulary = SequenceLayout(16, 2, 12), Vocabulary(80, 17, 16, 9)
    found = task_texts(
        split, "question_answering", tokenizer=tokenizer, layout=layout, vocabulary=vocabulary
    )
    for at in range(len(split)):
        assert found.left[at][1] == vocabulary.task_token("<LT_VQA>")
        assert found.right[at][1] == vocabulary.task_token("<RT_VQA>")
        assert tokenizer.decode(found.left[at].tolist()) == split.questions[at]
        assert tokenizer.decode(found.right[at].tolist()) == split.captions[at]
        assert EOS in found.left[at] and EOS in found.right[at]


def test_a_task_with_questions_needs_them(tmp_path: Path) -> None:
    config = write_table(tmp_path, write_questions(tmp_path), "csv")
    without = ManifestConfig(config.path)
    split = Split(DataConfig("manifest", 8, manifest=without), "train", tmp_path / "cache")
    with pytest.raises(ValueError, match="question_answering needs a question for every pair"):
        task_texts(split, "question_answering", tokenizer=None, layout=None, vocabulary=None)


@pytest.mark.parametrize(
    ("asked", "told", "fault"),
    [
        ([{"type": "text", "content": "что?"}], [{"type": "text", "content": "а"}], "no image"),
        ([{"type": "sound", "content": "a"}], [{"type": "text", "content": "а"}], "malformed"),
        ("что?", [{"type": "text", "content": "а"}], "malformed"),
        ([{"type": "image", "content": "0.png"}], None, "no answer"),
        (
            [{"type": "image", "content": "0.png"}],
            [{"type": "text", "content": "а"}],
            "empty question",
        ),
    ],
)
def test_a_question_that_cannot_be_used_is_skipped_and_named(
    tmp_path: Path, asked: Any, told: Any, fault: str
) -> None:
    config = write_table(tmp_path, write_questions(tmp_path), "json")
    questions, answers = (
        json.loads(Path(p).read_text(encoding="utf-8")) for p in (config.path, config.answers)
    )
    questions["bad"] = asked
    if told is not None:
        answers["bad"] = told
    Path(config.path).write_text(json.dumps(questions), encoding="utf-8")
    Path(str(config.answers)).write_text(json.dumps(answers), encoding="utf-8")
    manifest = Manifest(config, split="train", image_size=8)
    assert manifest.report.num_kept == 60 and manifest.report.num_rows == 61
    assert fault in manifest.report.summary() and "question bad" in manifest.report.summary()


@pytest.mark.parametrize(
    ("content", "answers", "words"),
    [
        ("{}", None, "need answers"),
        ("{}", "nothing.json", "no such file"),
        ("{", "told.json", "expected JSON in UTF-8"),
        ("[]", "told.json", "must map ids to lists"),
    ],
)
def test_a_file_of_questions_that_is_none_is_told(
    tmp_path: Path, content: str, answers: str | None, words: str
) -> None:
    (tmp_path / "asked.json").write_text(content)
    (tmp_path / "told.json").write_text("{}")
    path = None if answers is None else str(tmp_path / answers)
    with pytest.raises(ValueError, match=words):
        Manifest(
            ManifestConfig(str(tmp_path / "asked.json"), answers=path), split="train", image_size=8
        )


def test_emoji_of_another_style_get_names_and_questions(tmp_path: Path, capsys) -> None:
    names = ["1f600", "1f468-1f3fb-200d-1f680", "1f1ee-1f1f9", "0023-fe0f-20e3", "stranger"]
    for at, name in enumerate(names):
        Image.new("RGB", (9, 9), (at, 50, 0)).save(tmp_path / f"{name}.png")
    assert main(["data", "emoji-names", str(tmp_path)]) == 0
    assert "4 pairs; 1 images have no name" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "captions.csv").set_index("image")["caption"]
    assert table["1f1ee-1f1f9.png"] == "флаг: Италия"
    config = ManifestConfig(
        str(tmp_path / "questions.json"), answers=str(tmp_path / "answers.json")
    )
    rows = {(row.image, row.question): row.caption for row in read_rows(Path(config.path), config)}
    assert rows["1f1ee-1f1f9.png", "чей это флаг?"] == "Италия"
    person = "1f468-1f3fb-200d-1f680.png"
    assert rows[person, "какой тон кожи?"] == "очень светлый тон кожи"
    assert rows[person, "что на картинке?"] + ": очень светлый тон кожи" == table[person]
    with pytest.raises(ValueError, match="expected PNG files named after emoji"):
        write_emoji_tables(tmp_path.parent)
    # Missing files are written again; captions of the user are not replaced.
    (tmp_path / "1f600.png").unlink()
    assert write_emoji_tables(tmp_path)[0] == 3
    own = (tmp_path / "captions.csv").read_text() + "1f600.png,моя подпись\n"
    (tmp_path / "captions.csv").write_text(own)
    assert main(["data", "emoji-names", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert (
        "captions.csv: expected no file or a table of emoji names, got the row '1f600.png" in line
    )
    assert (tmp_path / "captions.csv").read_text() == own


def test_answers_are_drawn_after_their_own_question(tmp_path: Path) -> None:
    from rudolph.generation.filters import TokenSamplingConfig
    from rudolph.generation.pipeline import Pipeline
    from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
    from rudolph.models.vqgan.model import VQGAN, VQGANConfig
    from rudolph.models.vqgan.quantizers import QuantizerConfig

    torch.manual_seed(0)
    texts = ["какой цвет?", "цвет фона?", "красный", "синий"]
    tokenizer = Tokenizer.train(texts, vocab_size=60, path=tmp_path / "bpe.model")
    quantizer = QuantizerConfig("vq", 9, 4)
    pipeline = Pipeline(
        tokenizer,
        VQGAN(VQGANConfig(8, (4, 4, 4), 1, (), 4, quantizer=quantizer)),
        MaskedDecoder(
            DecoderConfig(2, 16, 2), SequenceLayout(12, 2, 6), Vocabulary(60, 17, 12, 9)
        ),
        batch_size=2,
    )
    images = torch.rand(3, 3, 8, 8)
    asked, plain = ["цвет фона?", "какой цвет?", "синий"], TokenSamplingConfig()
    together = pipeline.caption(images, config=plain, seeds=[1, 2, 3], questions=asked)
    for at in range(3):
        alone = pipeline.caption(
            images[at : at + 1], config=plain, seeds=[at + 1], questions=[asked[at]]
        )
        assert alone == [together[at]]
    assert together != pipeline.caption(images, config=plain, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match=r"questions: expected one per image \(3\), got 1"):
        pipeline.caption(images, config=plain, seeds=[1, 2, 3], questions=asked[:1])
