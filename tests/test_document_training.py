"""Training on files of documents: ids, labels, cuts, loader workers, and steps of each family."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_documents import SECTIONS, VOCABULARY, Letters, flat
from test_document_files import MMC4, OBELICS, conversation, many_rows, write_images, write_lines
from tiny_run import empty_database, quiet

from rudolph.config.experiment_file import load_experiment
from rudolph.config.run import resolve_run
from rudolph.data.datasets.document_files import ConversationsConfig, InterleavedConfig
from rudolph.data.documents import DocumentExamples, DocumentFormat
from rudolph.data.loader import Streams
from rudolph.data.splits import DataConfig, Splits
from rudolph.families.interface import Parts
from rudolph.families.registry import family_of
from rudolph.files.settings import ConfigError
from rudolph.generation.documents import answer_losses
from rudolph.runs.execution import Folders, Hardware, run_folder
from rudolph.runs.experiment import execute
from rudolph.sequence.conversation import IGNORE
from rudolph.sequence.layout import BOS, EOS
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.optim import build_optimizers

PAGE = Path(__file__).parent.parent / "rudolph" / "data" / "README.md"
FORMAT = DocumentFormat(120, 3, 512)
LETTERS: Any = Letters()
LETTERS.digest = "letters"


def conversations(folder: Path, rows: list[Any], task: str = "question_answering") -> DataConfig:
    path = write_lines(folder / "rows.jsonl", rows)
    config = ConversationsConfig(str(path), max_bad_fraction=0)
    return DataConfig("conversations", 8, {task: 1.0}, conversations=config)


def interleaved(folder: Path, layout: Any) -> DataConfig:
    """Write rows of a layout whose images differ, so that all splits have some."""
    write_images(folder, 66)
    rows: list[dict[str, Any]] = []
    for first in range(0, 66, 3):
        names = [f"{number}.png" for number in range(first, first + 3)]
        if layout == "obelics":
            rows.append(OBELICS | {"images": [None, None, *names[:2], None, names[2]]})
            continue
        infos = zip(MMC4["image_info"], names, strict=True)
        rows.append(MMC4 | {"image_info": [info | {"image_name": name} for info, name in infos]})
    path = write_lines(folder / "rows.jsonl", rows)
    config = InterleavedConfig(str(path), layout=layout)
    return DataConfig("interleaved", 8, {"image_captioning": 1.0}, interleaved=config)


def examples(
    config: DataConfig, cache: Path, form: DocumentFormat = FORMAT, split: str = "train"
) -> DocumentExamples:
    splits = Splits(config, cache)
    entries = [(entry, splits.open(split, entry.dataset)) for entry in config.mixture]
    return DocumentExamples(entries, LETTERS, form, seed=3, scores_questions=False)


def test_every_answer_of_a_document_is_a_label_and_nothing_else(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    row = conversation(
        "a", "до <image><image> после", "раз", "и?", "два", image=["1.png", "0.png"]
    )
    batch = examples(conversations(tmp_path, [row]), tmp_path / "cache").batch([0, 1])
    before, after, and_ = (LETTERS.encode(text) for text in ("до", "после", "и?"))
    one, two = ([*LETTERS.encode(text), EOS] for text in ("раз", "два"))
    ids = [BOS, *before, *[120] * 6, *after, *one, *and_, *two]
    hidden = [IGNORE] * (1 + len(before) + 6 + len(after))
    assert batch.input_ids.tolist() == [ids, ids]
    assert batch.labels.tolist() == [[*hidden, *one, *[IGNORE] * len(and_), *two]] * 2
    split = examples(conversations(tmp_path, [row]), tmp_path / "cache").entries[0][1]
    assert torch.equal(batch.images[0], split.image_batch([0, 1]))
    assert batch.images.shape == (2, 2, 3, 8, 8) and batch.present.all()


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("question_answering", "iqaqa"),
        ("image_captioning", "iaa"),
        ("text_question_answering", "qaqa"),
        ("text_to_text", "aa"),
    ],
)
def test_the_task_decides_what_a_document_has(task: str, kinds: str, tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    row = conversation("a", "<image>да", "нет", "ты", "она", image="0.png")
    batch = examples(conversations(tmp_path, [row], task), tmp_path / "cache").batch([0])
    words = {"i": [[120] * 3], "q": [LETTERS.encode("да"), LETTERS.encode("ты")]}
    words["a"] = [[*LETTERS.encode(text), EOS] for text in ("нет", "она")]
    taken = {kind: iter(values) for kind, values in words.items()}
    assert batch.input_ids.tolist() == [[BOS, *(t for kind in kinds for t in next(taken[kind]))]]
    assert (batch.images is None) == ("i" not in kinds)


def test_a_long_document_is_cut_after_an_answer_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    rows = [
        conversation("a", "<image>", "12345", "<image>", "12345", image=["0.png", "0.png"]),
        conversation("b", "<image>", "1", "<image>", "1", image=["0.png", "0.png"]),
        conversation("c", "<image>", "0123456789", image="0.png"),
    ]
    # BOS, then three positions of an image, the letters of an answer and EOS.
    form = DocumentFormat(120, 3, 12)
    made = examples(conversations(tmp_path, rows), tmp_path / "cache", form)
    assert made.note() == (
        "2 documents of question_answering (1 cut after an answer, 1 left out as too long)"
    )
    batch = made.whole(range(made.num_whole))
    assert batch.examples.tolist() == [0, 1]
    assert batch.attention_mask.sum(1).tolist() == [10, 11]
    assert batch.present.tolist() == [[True, False], [True, True]]
    with pytest.raises(
        ValueError, match=r"^model\.max_length: expected room for the first answer"
    ):
        examples(conversations(tmp_path, rows), tmp_path / "cache", DocumentFormat(120, 3, 5))


class OneDevice:
    """The state of a trainer that a loader reads."""

    world_size, global_rank = 1, 0

    class fit_loop:
        class epoch_loop:
            class batch_progress:
                class current:
                    completed = 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers(num_workers: int, tmp_path: Path) -> None:
    made = examples(conversations(tmp_path, many_rows(tmp_path, 30)), tmp_path / "cache")
    streams = Streams(
        made.batch,
        made.whole,
        global_batch_size=8,
        micro_batch_size=4,
        num_steps=3,
        num_validation=made.num_whole,
        num_workers=num_workers,
    )
    trainer: Any = OneDevice
    streams.trainer = trainer
    parts = [part for step in streams.train_dataloader() for part in step]
    assert len(parts) == 6
    for number, part in enumerate(parts):
        alone = [made.batch([4 * number + row]) for row in range(4)]
        for row, single in enumerate(alone):
            is_token = part.attention_mask[row].bool()
            assert torch.equal(part.input_ids[row][is_token], single.input_ids[0])
            assert torch.equal(part.labels[row][is_token], single.labels[0])
            assert part.examples[row] == single.examples[0]
            if single.images is not None:
                assert torch.equal(part.images[row][part.present[row]], single.images[0])


def run_settings(case: str, data: DataConfig, **changes: Any) -> dict[str, Any]:
    own: Any = getattr(data, data.dataset)
    section = {"family": case, **SECTIONS[case], "trained": "all", **changes}
    return flat(
        {
            "model": section,
            "tokenizer": {"vocab_size": VOCABULARY, "num_specials": 0},
            "data": {"dataset": data.dataset, "image_size": 24, data.dataset: vars(own)},
            "data.tasks": data.tasks,
        }
    )


@pytest.mark.parametrize("case", ["flamingo", "llava", "late fusion", "patches"])
@pytest.mark.parametrize("layout", ["llava", "mmc4", "obelics"])
def test_each_reader_of_images_learns_each_layout_in_two_steps(
    case: str, layout: str, tmp_path: Path
) -> None:
    if layout == "llava":
        data = conversations(tmp_path, many_rows(tmp_path, 12))
    else:
        data = interleaved(tmp_path, layout)
    changes = {"question_first": False} if case == "patches" else {}
    config = resolve_run(Path("x"), run_settings(case, data, **changes))
    splits = Splits(config.data, tmp_path / "cache")
    texts = splits.open("train").texts()
    tokenizer = Tokenizer.train(texts, vocab_size=VOCABULARY, path=tmp_path / "bpe.model")
    family, parts = family_of(config.model), Parts(tokenizer)
    model = family.build(config, parts)
    batch = family.examples(config, splits, "train", parts).batch(range(6))
    assert batch.images.shape[1] > 1
    reader: Any = family.reader(config, model)
    optimizers, losses = build_optimizers(model, config.optim), []
    for _ in range(2):
        loss = answer_losses(reader, batch)[0].mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[0]) and losses[1] < losses[0]


def run_of_page(folder: Path, *overrides: str) -> Path:
    """Run the experiment of the page in a folder, and return the folder of its run."""
    [text] = re.findall(r"```yaml\n(title: .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    assert yaml.safe_load(text)["settings"]["data"]["dataset"] == "conversations"
    (folder / "mlflow.db").write_bytes(empty_database())
    experiment = load_experiment(path, overrides)
    folders = Folders(folder, folder / "runs")
    execute(
        experiment,
        experiment.runs[0],
        folders=folders,
        hardware=Hardware(precision="32-true", accelerator="cpu", micro_batch_size=2),
        uri=f"sqlite:///{folder}/mlflow.db",
        progress=quiet,
    )
    return run_folder(folders, experiment, experiment.runs[0])


@pytest.mark.parametrize("trained", ["all", "connector"])
def test_the_experiment_of_the_page_runs(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rows = many_rows(tmp_path / "images", 60)
    if trained == "connector":
        # Most micro-batches have no image, and so no weight that learns from them.
        rows = [
            row if index % 6 == 5 else conversation(index, "что?", f"ответ {index}")
            for index, row in enumerate(rows)
        ]
    (tmp_path / "conversations.json").write_text(json.dumps(rows), encoding="utf-8")
    overrides = ("optim.num_steps=2", "optim.global_batch_size=6", "optim.warmup_steps=1")
    folder = run_of_page(tmp_path, *overrides, f"model.trained={trained}")
    assert json.loads((folder / "summary.json").read_text("utf-8"))["status"] == "finished"
    assert (folder / "checkpoints" / "llava.safetensors").is_file()


def test_settings_that_documents_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = conversations(tmp_path, [conversation("a", "q", "a")])
    for changes, message in (
        ({"model.family": "clip"}, r"model\.family: expected one that reads the documents of"),
        ({"model.question_first": True}, r"model\.question_first: expected false, since the fil"),
        (
            {"evaluation.evaluators": ["caption_f1"]},
            r"evaluation\.evaluators: caption_f1 needs a dataset of pairs, got documents",
        ),
        ({"data.conversations.max_images": 0}, r"max_images.* at least 1"),
        ({"data.tasks": {"text_to_image": 1}}, r"family llava cannot generate images"),
    ):
        settings = run_settings("llava", data) | changes
        if "model.family" in changes:
            settings = {name: value for name, value in settings.items() if "model." not in name}
        with pytest.raises(ConfigError, match=message):
            resolve_run(Path("x"), settings | changes)
    with pytest.raises(ValueError, match="conversations: expected pairs, got a dataset of docume"):
        Splits(data, tmp_path / "cache")("train")
