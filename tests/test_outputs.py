"""Outputs of generate and caption: checked before the work, and kept if a disk or stage fails."""

import errno
import json
import random
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import num_cases, random_text
from PIL import Image
from torch import Tensor

from rudolph.cli import main, sampling
from rudolph.cli.outputs import check_output, write_or_rescue
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.png import read_text_fields
from rudolph.generation.ranking import Ranking
from rudolph.runs.resolve import LoadedModel, open_model

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def shipped() -> LoadedModel:
    return open_model("shipped", runs=Path("runs"), uri="")


@pytest.fixture
def sampled(
    shipped: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Sequence[str]]:
    """Replace the shipped model's sampling by an instant one; return its prompts."""
    prompts: list[Sequence[str]] = []
    real = sampling.load_requested

    def opened(given: Any) -> LoadedModel:
        return (
            replace(shipped, pipeline=replace(shipped.pipeline))
            if given.model == "shipped"
            else real(given)
        )

    def indices(self: Pipeline, captions: Sequence[str], **settings: Any) -> Tensor:
        prompts.append(captions)
        for caption in captions:
            self.texts("text_to_image", caption)
        drawn = [
            torch.full((self.decoder.layout.num_image_tokens,), seed % 90)
            for seed in settings["seeds"]
        ]
        return torch.stack(drawn)

    def caption(
        self: Pipeline, images: Tensor, *, seeds: Sequence[int], questions: Any, **_: Any
    ) -> list[str]:
        prompts.append(questions or [""])
        return [f"ответ\x85{seed % 3}" for seed in seeds]

    monkeypatch.setattr(sampling, "load_requested", opened)
    monkeypatch.setattr(Pipeline, "generate_indices", indices)
    monkeypatch.setattr(Pipeline, "caption", caption)
    monkeypatch.setattr(Pipeline, "pack", lambda self, *_, **__: None)
    monkeypatch.setenv("RUDOLPH_WEIGHTS", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return prompts


def failing(*names: str) -> Callable[[Path], None]:
    """Return a writer that fails, as on a full disk, for paths that contain one of the names."""

    def write(path: Path) -> None:
        if any(name in str(path) for name in names):
            raise FULL
        path.write_text("written", encoding="utf-8")

    return write


def said(action: Callable[[], object]) -> str:
    """Return the one-line message of the ``ValueError`` that ``action`` raises."""
    with pytest.raises(ValueError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a.png", None),
        ("new/folder/a.PNG", None),
        ("folder/../a.png", None),
        ("a.jpg", "must end with .png"),
        ("file.png", "expected the folder file, got the file file"),
        ("file/a.png", "expected the folder file, got the file file"),
        ("file/deep/a.png", "got the file file"),
        ("folder.png", "expected a file, got the folder folder.png"),
        ("b.png", "expected a file, got the folder b.jsonl"),
        ("dangling/a.png", "got the file dangling"),
        ("/proc/self/a.png", "a folder that can be written, got /proc/self"),
    ],
)
def test_an_output_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("", encoding="utf-8")
    for name in ("folder.png", "b.jsonl", "folder"):
        Path(name).mkdir()
    Path("dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    if words is None:
        check_output(Path(path), suffix=".jsonl", has_folder=True)
    else:
        message = said(lambda: check_output(Path(path), suffix=".jsonl", has_folder=True))
        assert message.startswith("--output") and words in message
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_written_goes_into_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_or_rescue(tmp_path / "a.png", failing())
    assert (tmp_path / "a.png").read_text() == "written"
    message = said(lambda: write_or_rescue(tmp_path / "b.png", failing("b.png")))
    [folder] = tmp_path.glob("rudolph-*")
    assert message == (
        f"{tmp_path / 'b.png'}: cannot be written (no space left on device). "
        f"The files are in {folder} instead"
    )
    assert (folder / "rescued.png").read_text() == "written"
    message = said(lambda: write_or_rescue(tmp_path / "c.png", failing("c.png", "rescued")))
    assert message.endswith("nor can a temporary file (no space left on device)")


def test_a_full_disk_loses_no_image(
    sampled: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = Image.Image.save

    def save(self: Image.Image, path: Path, *arguments: Any, **settings: Any) -> None:
        if not Path(path).is_relative_to(Path(tempfile.gettempdir()).resolve()):
            raise FULL
        real(self, path, *arguments, **settings)

    monkeypatch.setattr(Image.Image, "save", save)
    assert main(["generate", "олень", "-n", "3", "--output", "a.png"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    [folder] = Path(tempfile.gettempdir()).iterdir()
    assert line.startswith("rudolph: a.png: cannot be written (no space") and str(folder) in line
    records = [json.loads(each) for each in (folder / "rescued.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert all(read_text_fields(Path(record["file"]))["prompt"] == "олень" for record in records)


@pytest.mark.parametrize("stage", ["decode", "rank", "clip", "upscale"])
def test_what_was_sampled_is_kept_when_a_later_stage_fails(
    sampled: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any, stage: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    def add_stages(pipeline: Pipeline, given: Any) -> None:
        pipeline.clip = type("Clip", (), {"similarities": fail})() if stage == "clip" else None
        pipeline.upscaler = object() if stage == "upscale" else None

    monkeypatch.setattr(sampling, "add_stages", add_stages)
    if stage == "rank":
        monkeypatch.setattr("rudolph.generation.pipeline.rank_images", fail)
    elif stage != "clip":
        monkeypatch.setattr(Pipeline, stage, fail)
    assert main(["generate", "олень", "-n", "3", "--rank", "self", "--keep", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"rudolph: {stage}: CUDA out of memory. Tried to allocate. ")
    records = [
        json.loads(each)
        for each in Path("generated.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(records) == 3
    if stage == "decode":
        assert "The image codes of all 3 samples are saved in generated.jsonl" in line
        assert all(len(record["indices"]) == 64 for record in records)
    else:
        assert "All 3 images are saved as sampled in generated.png" in line
        assert all(Path(record["file"]).is_file() for record in records)


def test_a_grid_that_cannot_be_drawn_leaves_the_single_images(
    sampled: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("raqm_layout() failed.")

    monkeypatch.setattr("rudolph.reports.image_grids._sheet", fail)
    assert main(["generate", "олень", "-n", "2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "generated.png: cannot be drawn (raqm_layout() failed.)" in line
    assert line.endswith("The single images are in generated")
    assert len(list(Path("generated").glob("*.png"))) == 2


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_a_second_call_replaces_all_that_the_first_wrote_and_nothing_else(
    sampled: list[Sequence[str]],
) -> None:
    assert main(["generate", "олень", "-n", "5"]) == 0
    Image.new("RGB", (16, 16), "red").save("generated/007.png")
    Path("generated/notes.txt").write_text("mine", encoding="utf-8")
    Path("generated/008.png").write_text("no image", encoding="utf-8")
    Path("generated/004.png").rename("generated/best.png")
    kept = {
        path: path.read_bytes() for path in Path("generated").iterdir() if path.stem[:2] != "00"
    }
    kept |= {path: path.read_bytes() for path in Path("generated").glob("00[78].png")}
    assert main(["generate", "кот", "-n", "2", "--seed", "3"]) == 0
    names = {path.name for path in Path("generated").iterdir()}
    assert names == {"000.png", "001.png", *(path.name for path in kept)}
    assert all(path.read_bytes() == content for path, content in kept.items())
    for number in range(2):
        assert read_text_fields(Path(f"generated/{number:03}.png"))["prompt"] == "кот"


def test_where_nothing_can_be_decoded_no_earlier_image_stands_beside_the_codes(
    sampled: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    assert main(["generate", "олень", "-n", "3"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("rudolph.reports.image_grids._sheet", fail)
        assert main(["generate", "кот", "-n", "2"]) == 2
    # A kept grid would show the first call's images.
    assert written(Path()) == ["generated.jsonl", "generated/000.png", "generated/001.png"]
    assert main(["generate", "олень", "-n", "3"]) == 0
    monkeypatch.setattr(Pipeline, "decode", fail)
    assert main(["generate", "кот", "-n", "2"]) == 2
    assert written(Path()) == ["generated.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["--image-prompt", "a.png", "--vary", "1", "--output", "./a.png"], "a.png"),
        (["--image-prompt", "b/0.png", "--vary", "1", "--output", "b.png"], "b/0.png"),
        (["--image-prompt", "a.png", "--mask", "l.png", "--output", "b/0.png"], "l.png"),
        (["--model", "weights", "--output", "weights/a.png"], "weights"),
        (["--model", "weights/run", "--output", "weights.png"], "weights/run"),
        (["--clip", "weights", "--output", "weights/run/a.png"], "weights"),
        (["caption", "a.png", "--output", "b/../a.png"], "a.png"),
        (["caption", "l.png", "--output", "b/0.png"], "l.png"),
    ],
)
def test_an_output_that_would_meet_what_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "load_requested", lambda given: pytest.fail("opened"))
    for folder in ("b", "weights/run"):
        Path(folder).mkdir(parents=True)
    for path in ("a.png", "b/0.png"):
        Image.new("RGB", (16, 16), "red").save(path)
    Path("l.png").symlink_to("b/0.png")
    before = {path: path.read_bytes() for path in Path().rglob("*.png")}
    words = [] if arguments[0] == "caption" else ["generate", "кот"]
    assert main([*words, *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rudolph: --output: expected a path apart from {source}, got ")
    assert {path: path.read_bytes() for path in Path().rglob("*.png")} == before


def test_scores_that_are_no_numbers_leave_json_that_any_reader_takes(
    sampled: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranked(pipeline: Any, indices: Tensor, *_: Any, **__: Any) -> Ranking:
        values = torch.tensor([torch.nan, torch.inf, -torch.inf])
        return Ranking(values, values, values)

    monkeypatch.setattr("rudolph.generation.pipeline.rank_images", ranked)
    assert main(["generate", "олень", "-n", "3", "--rank", "self"]) == 0
    lines = Path("generated.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    found = {record["scores"]["self"] for record in records}
    assert found == {"nan", "inf", "-inf"}
    for record in records:
        told = json.loads(
            read_text_fields(Path(record["file"]))["scores"], parse_constant=pytest.fail
        )
        assert told == record["scores"]


def test_the_label_of_a_very_long_prompt_is_cut_and_drawn_at_once(
    sampled: list[Sequence[str]],
) -> None:
    for number, letters in enumerate((500, 12_000)):
        started = time.process_time()
        text = ("красное сердце " * 1000)[:letters]
        assert main(["generate", text, "-n", "4", "--output", f"{number}.png"]) == 0
        assert time.process_time() - started < 5
    sizes = []
    for number in range(2):
        with Image.open(f"{number}.png") as grid:
            sizes.append(grid.size)
    assert sizes[0] == sizes[1] and sizes[1][1] < 1500


def test_a_composed_and_a_decomposed_prompt_are_one(sampled: list[Sequence[str]]) -> None:
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, "зелёный чай")
        assert main(["generate", text, "-n", "1", "--output", f"{form}.png"]) == 0
    assert sampled == [["зелёный чай"]] * 2
    records = [
        json.loads(Path(f"{form}.jsonl").read_text(encoding="utf-8")) for form in ("NFC", "NFD")
    ]
    assert records[0]["prompt"] == records[1]["prompt"] == "зелёный чай"


@pytest.mark.parametrize("verb", ["generate", "caption"])
def test_an_unknown_part_of_a_text_is_said_once_and_no_known_one(
    sampled: list[Sequence[str]], capsys: Any, verb: str
) -> None:
    Image.new("RGB", (16, 16), "red").save("a.png")
    words = ["generate"] if verb == "generate" else ["caption", "a.png", "--question"]
    for text in ("красный кот", "a red cat"):
        assert main([*words, text, "-n", "1"]) == 0
        lines = capsys.readouterr().err.splitlines()
        notes = [line for line in lines if "unknown characters" in line]
        assert len(notes) == (text == "a red cat")
        assert all("'red'" in note for note in notes)


def test_captions_are_written_even_where_the_terminal_cannot_show_them(
    sampled: list[Sequence[str]], capsys: Any
) -> None:
    Image.new("RGB", (16, 16), "red").save("a.png")
    assert main(["caption", "a.png", "-n", "2"]) == 0
    assert "ответ" in capsys.readouterr().out
    assert sum(json.loads(Path("captioned.json").read_text("utf-8"))["captions"].values()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["кот \udcd0"], "text: expected text in UTF-8"),
        (["кот", "--output", "a\udcd0.png"], "--output: expected text in UTF-8"),
        (["кот", "--output", "file.png"], "--output: expected the folder file, got the file file"),
        (["кот", "--temperature", "nan"], "temperature must be above 0"),
        (["кот", "--temperature", "inf"], "temperature must be 1e-06 to 1e+06, got inf"),
        (["кот", "--temperature", "1e-40"], "temperature must be 1e-06 to 1e+06, got 1e-40"),
        (["кот", "--guidance", "nan"], "guidance must be finite and at least 0 or null, got nan"),
        (["кот", "--guidance", "inf"], "guidance must be finite and at least 0 or null, got inf"),
        (["кот", "--guidance", "1e7"], "guidance must be at most 1e+06, got 1e+07"),
        (["кот", "--top-p", "nan"], "top_p must be in (0, 1]"),
        (["кот", "--top-p=-0.5"], "top_p must be in (0, 1] or null, got -0.5"),
        (["кот", "--min-p", "nan"], "min_p must be in (0, 1]"),
        (["кот", "--min-p=-inf"], "min_p must be in (0, 1]"),
        (["кот", "-n", "99999999999"], "-n must be at most 10000"),
        (["кот", "--image-prompt", "/dev/zero", "--vary", "1"], "expected an image file, got a"),
        (
            ["кот", "--image-prompt", "file", "--vary", "nan"],
            "fraction to sample again: expected above 0",
        ),
        (["кот", "--image-prompt", "file", "--vary", "1"], "file: corrupt image"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "load_requested", lambda given: pytest.fail("opened"))
    Path("file").write_text("text", encoding="utf-8")
    assert main(["generate", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-300",
    "0.5",
    "1.0",
    "x",
    "",
)
NUMBERS += ("9" * 30, "2147483648", " 2", "1_0", "٣", "0x10", "1e-6")
PATHS = ("image.png", "text.png", "empty.png", "missing.png", "folder", "folder.png", ".", "")
PATHS += ("/dev/null", "text.png/a.png", "new/a.png", "n" * 300 + ".png", "a\udcff.png", "й.png")
PATHS += ("shipped", "newest", "/proc/self/a.png", "b.PNG", "..", "~", "~/a.png")
FLAGS: dict[str, Sequence[str | None]] = {
    **dict.fromkeys(("-n", "--seed", "--top-k"), NUMBERS),
    **dict.fromkeys(("--temperature", "--top-p", "--min-p"), NUMBERS),
    **dict.fromkeys(("--model", "--output"), PATHS),
    "--dtype": ("float32", "bfloat16", "x"),
    "--int8": (None,),
}
GENERATE: dict[str, Sequence[str | None]] = {
    **FLAGS,
    **dict.fromkeys(("--guidance", "--keep", "--vary", "--window", "--upscale"), NUMBERS),
    **dict.fromkeys(("--clip", "--upscaler", "--image-prompt", "--mask"), PATHS),
    "--guidance-kind": ("extrapolation", "mixture", "x"),
    "--rank": ("self", "clip", "none", "x"),
    "--perplexity": ("exp_mean_ce", "mean_exp_ce"),
    "--borders": ("up=1", "up=1,left=9", "up=", "=", "", "up=99999999999999999999", "лево=1"),
    "--transparent": (None,),
}


def random_arguments(rng: random.Random) -> list[str]:
    """Return a call of generate or caption with a few flags and random values."""
    text = random_text(rng, longest=rng.choice([0, 5, 40, 2000]))
    if rng.random() < 0.6:
        words, flags = ["generate", f"--output={rng.choice(PATHS)}", "--", text], GENERATE
    else:
        words = ["caption", "--", rng.choice(PATHS)]
        words[1:1] = [f"--question={text}"] if rng.random() < 0.6 else []
        flags = FLAGS
    if rng.random() < 0.5:
        words[1:2] = ["--output=out.png"] if words[0] == "generate" else words[1:2]
    for flag in rng.sample(sorted(flags), rng.randint(0, 3)):
        value = rng.choice(flags[flag])
        joined = flag if value is None else f"{flag}={value}" if len(flag) > 2 else flag + value
        words.insert(1, joined)
    return words


def test_any_arguments_are_taken_or_refused_in_one_line(
    sampled: list[Sequence[str]], capsys: Any
) -> None:
    rng = random.Random(5)
    noise = np.random.default_rng(0).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    Image.fromarray(noise).save("image.png")
    Path("text.png").write_text("no image", encoding="utf-8")
    Path("empty.png").write_text("", encoding="utf-8")
    for name in ("folder", "folder.png"):
        Path(name).mkdir()
    counts = {0: 0, 2: 0}
    for _ in range(num_cases(15)):
        arguments = random_arguments(rng)
        try:
            code = main(arguments)
        except SystemExit as stop:
            # argparse itself refuses, after printing its usage.
            code = int(str(stop.code))
            assert "usage: " in capsys.readouterr().err
        assert code in counts, arguments
        counts[code] += 1
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("rudolph: ") for line in lines) <= 1, (arguments, lines)
        assert not any("Traceback" in line for line in lines), (arguments, lines)
    print(f"fuzz of generate and caption: {counts[0]} accepted, {counts[2]} refused")
    assert min(counts.values()) > 0
