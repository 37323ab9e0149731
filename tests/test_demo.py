"""The demo without its widgets: requests, results, limits, uploads and the look inside."""

import hashlib
import io
import re
import shlex
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import config_for, scenes

from rudolph.cli import build_parser, main
from rudolph.cli.sampling import arguments_of
from rudolph.demo.claims import claim_rows, experiments_in, result_page
from rudolph.demo.describing import caption_arguments, describe
from rudolph.demo.generating import generate, generate_arguments
from rudolph.demo.limits import DemoLimits, StoppedError, Watch
from rudolph.demo.looking_inside import (
    Inspection,
    attention_view,
    inspect,
    masks_image,
    replay_frames,
)
from rudolph.demo.sessions import ARCHIVE, Demo, DemoError
from rudolph.demo.shelf import ModelShelf, ShelfSettings
from rudolph.demo.uploads import Uploads
from rudolph.files.atomic import read_json
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.png import to_image
from rudolph.models.layers.attention import FullView
from rudolph.models.rudolph.attention_maps import attention_weights
from rudolph.models.vision.clip import CLIP
from rudolph.runs.sampling import CaptionArguments, GenerateArguments

RESULTS = Path(__file__).parent.parent / "results"
FORM = {"model": "shipped", "text": "олень", "number": 2, "seed": 5}
LIMITS = DemoLimits()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> ModelShelf:
    runs = tmp_path_factory.mktemp("runs")
    return ModelShelf(ShelfSettings(("shipped",), runs, uri=""))


@pytest.fixture(scope="module")
def deer(shelf: ModelShelf) -> Inspection:
    arguments = generate_arguments(FORM | {"top_k": 1, "guidance": 2}, shelf, LIMITS)
    return inspect(arguments, shelf=shelf, watch=Watch(60))


@pytest.fixture
def demo(shelf: ModelShelf, tmp_path: Path) -> Demo:
    return Demo(shelf, LIMITS, results=RESULTS, files=tmp_path)


def file_of(content: bytes, folder: Path) -> dict[str, str]:
    path = folder / f"{hashlib.sha256(content).hexdigest()}.png"
    path.write_bytes(content)
    return {"path": str(path)}


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": "self", "keep": "1", "temperature": "1,5", "top_p": "0.9", "guidance": "1.5"},
        {"region": "mask"},
        {"region": "vary", "vary": 0.5, "number": 1},
    ],
)
def test_the_shown_command_writes_the_same_bytes(
    shelf: ModelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    arguments = generate_arguments(FORM | changes, shelf, LIMITS)
    mask = np.zeros((80, 80, 3), np.uint8)
    mask[40:] = 255
    images = {
        "image_prompt": Image.new("RGB", (80, 80), "orange"),
        "mask": Image.fromarray(mask),
    }
    images = {name: image for name, image in images.items() if getattr(arguments, name)}
    result = generate(arguments, images, shelf=shelf, watch=Watch(60))
    monkeypatch.chdir(tmp_path)
    for name in images:
        Path(f"{name}.png").write_bytes(result.files[f"{name}.png"])
    assert main(shlex.split(result.command)[1:]) == 0
    written = {f"generated/{path.name}": path.read_bytes() for path in Path("generated").iterdir()}
    assert written == {
        name: content for name, content in result.files.items() if name.startswith("generated/")
    }
    assert len(written) == (1 if "keep" in changes else arguments.number)


@pytest.mark.parametrize(
    "changes", [{"request": "question", "question": "что это?"}, {"request": "classes"}]
)
def test_the_shown_command_gives_the_same_texts(
    shelf: ModelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    form = FORM | {"classes": "олень, кот\nфлаг: Италия"} | changes
    image = Image.new("RGB", (70, 64), "brown")
    arguments = caption_arguments(form, shelf, LIMITS)
    result = describe(arguments, image, shelf=shelf, watch=Watch(60))
    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(result.files["image.png"])
    assert main(shlex.split(result.command)[1:]) == 0
    assert Path("captioned.json").read_text("utf-8") == result.files["settings.json"].decode()
    values = read_json(Path("captioned.json"))["classes" if arguments.classes else "captions"]
    total = sum(values.values())
    assert result.values == {text or "-": value / total for text, value in values.items()}
    assert sum(result.values.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments",
    [
        GenerateArguments(text="it's a 'кот'", number=3, seed=7, guidance=2.5, top_k=5),
        GenerateArguments(text="-n", model="a b", rank="self", keep=2, int8=True, dtype="float16"),
        GenerateArguments(text="к", image_prompt=Path("a.png"), vary=0.25, transparent=True),
        CaptionArguments(image=Path("a.png"), question="--что?", min_p=0.1),
        CaptionArguments(image=Path("a.png"), classes=("красный круг", "кот")),
    ],
)
def test_a_command_is_parsed_back_into_its_arguments(arguments: Any) -> None:
    args = build_parser().parse_args(shlex.split(arguments.command())[1:])
    assert arguments_of(type(arguments), args) == arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "  \x00 "}, "prompt: expected a text, got none"),
        ({"text": None}, "prompt: expected a text, got none"),
        ({"text": "кот" * 999}, "prompt: expected at most 400 characters, got 2997"),
        ({"number": 10**9}, "number: expected a whole number from 1 to 16, got 1e+09"),
        ({"number": "many"}, "number: expected a number, got 'many'"),
        ({"number": 2.5}, "number: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"temperature": "nan"}, "temperature: expected a number, got 'nan'"),
        ({"temperature": "-3"}, "temperature must be above 0"),
        ({"top_k": "0"}, "top_k must be at least 1"),
        ({"top_p": [1]}, "top-p: expected a number"),
        ({"keep": 3}, "keep must be 1 to the number 2, got 3"),
        ({"model": "/etc/passwd"}, "model: expected one of shipped"),
        ({"rank": "best"}, "rank: expected one of none, self, clip"),
        ({"region": "borders", "borders": "up"}, "borders: expected widths in tokens"),
        ({"region": "vary", "vary": 7}, "fraction to sample again"),
    ],
)
def test_an_absurd_value_is_one_line(
    shelf: ModelShelf, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=r"expected|must") as error:
        generate_arguments(FORM | changes, shelf, LIMITS)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize("classes", ["", "кот", "кот, кот", "кот, -n", ",".join("абв" * 30)])
def test_classes_that_cannot_be_compared_are_rejected(shelf: ModelShelf, classes: str) -> None:
    with pytest.raises(ValueError, match="class"):
        caption_arguments(FORM | {"request": "classes", "classes": classes}, shelf, LIMITS)


def test_an_upload_is_decoded_like_a_data_file_and_from_one_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    uploads = Uploads(folder, max_bytes=10_000)
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert uploads.image(file_of(png_of(image), folder), "image").getpixel((3, 3)) == (255,) * 3
    outside = file_of(png_of(image), tmp_path)
    (folder / "link.png").symlink_to(outside["path"])
    for file, words in [
        (file_of(png_of(image)[:40], folder), "got a file with: corrupt image"),
        (file_of(b"<svg/>", folder), "got a file with: corrupt image"),
        (file_of(png_of(image.crop((0, 0, 4, 4))), folder), "got a file with: too small"),
        (file_of(bytes(10_001), folder), "expected at most 10000 bytes, got 10001"),
        (outside, "expected an uploaded file, got another one"),
        ({"path": str(folder / "link.png")}, "expected an uploaded file, got another one"),
        (
            {"path": f"{folder}/../{Path(outside['path']).name}"},
            "expected an uploaded file, got another one",
        ),
        (None, "expected one, got none"),
        ("upload.png", "expected one, got none"),
    ]:
        with pytest.raises(ValueError, match="image: ") as error:
            uploads.image(file, "image")
        assert words in str(error.value)


def test_a_painted_layer_is_a_mask_that_is_white_where_painted(tmp_path: Path) -> None:
    layer = np.zeros((16, 24, 4), np.uint8)
    layer[:8, :12, 3] = 255
    uploads = Uploads(tmp_path, max_bytes=10_000)
    mask = uploads.mask(file_of(png_of(Image.fromarray(layer)), tmp_path), (24, 16))
    assert np.array_equal(np.asarray(mask)[..., 1] == 255, layer[..., 3] == 255)
    with pytest.raises(ValueError, match="Paint over the image"):
        uploads.mask(file_of(png_of(Image.fromarray(0 * layer)), tmp_path), (24, 16))


def test_a_cancelled_generation_ends_at_the_next_token(shelf: ModelShelf) -> None:
    seen: list[int] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if stage == "sample" and done >= 5:
            watch.cancel()

    watch = Watch(60, on_progress)
    arguments = generate_arguments(FORM | {"number": 1}, shelf, LIMITS)
    with pytest.raises(StoppedError, match="cancelled, sample 6 of 64"):
        generate(arguments, {}, shelf=shelf, watch=watch)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_request_has_limited_time_that_starts_with_its_turn() -> None:
    watch = Watch(0.05)
    time.sleep(0.1)
    watch.start()
    watch("sample", 1, 2)
    time.sleep(0.1)
    with pytest.raises(StoppedError, match=r"stopped after 0.05 seconds, sample 2 of 2"):
        watch("sample", 2, 2)


def test_a_second_user_waits_and_can_cancel_while_waiting(demo: Demo) -> None:
    order: list[str] = []

    def second() -> None:
        try:
            with demo.request("second"):
                order.append("second")
        except DemoError as error:
            order.append(str(error))

    for cancels in (False, True):
        thread = threading.Thread(target=second)
        with demo.request("first"):
            thread.start()
            while "second" not in demo.watches:
                time.sleep(0.001)
            assert demo.cancel("second") == 1 if cancels else demo.cancel("third") == 0
            order.append("first")
        thread.join()
    assert order == ["first", "second", "first", "cancelled, waiting"]
    assert demo.watches == {}


def test_a_failed_request_is_one_line_without_folders_and_the_next_one_runs(demo: Demo) -> None:
    with pytest.raises(DemoError) as error, demo.request("user"):
        raise RuntimeError("out of memory\nin /models/a.bin")
    assert str(error.value) == "out of memory in a.bin"
    with demo.request("user") as watch:
        watch("sample", 1, 1)


def test_the_archive_of_a_result_holds_every_file_and_depends_on_nothing_else(demo: Demo) -> None:
    files = {"generated/000.png": b"one", "command.txt": b"rudolph"}
    folders = [demo.save(files) for _ in range(2)]
    first, second = ((folder / ARCHIVE).read_bytes() for folder in folders)
    assert first == second and folders[0] != folders[1]
    with zipfile.ZipFile(folders[0] / ARCHIVE) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files


def test_a_model_is_loaded_once_and_the_one_unused_for_longest_is_dropped(
    shelf: ModelShelf, tmp_path: Path
) -> None:
    copies = [tmp_path / name for name in "ab"]
    for copy in copies:
        copy.symlink_to(Path(shelf.open(GenerateArguments()).pipeline.tokenizer.path).parents[1])
    names = ("shipped", *map(str, copies))
    small = ModelShelf(ShelfSettings(names, tmp_path, uri="", capacity=2))
    opened = [small.open(GenerateArguments(model=names[index])) for index in (0, 1, 0, 2)]
    assert opened[0] is opened[2]
    assert list(small.loaded) == [names[0], names[2]]
    with pytest.raises(ValueError, match="no such folder"):
        ModelShelf(ShelfSettings((str(tmp_path / "c"),), tmp_path, uri=""))


def test_images_are_ranked_by_the_clip_of_the_demo_and_other_requests_do_without(
    shelf: ModelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = generate_arguments(FORM | {"rank": "clip", "number": 3}, shelf, LIMITS)
    with pytest.raises(ValueError, match="rank clip: expected a demo with --clip"):
        generate(arguments, {}, shelf=shelf, watch=Watch(60))
    torch.manual_seed(0)
    _, tokenizer = scenes(tmp_path)
    ranker = ClipRanker(CLIP(config_for(tokenizer)), tokenizer)
    monkeypatch.setattr("rudolph.demo.shelf.open_clip", lambda source, runs: ranker)
    own = ModelShelf(replace(shelf.settings, clip="tiny"))
    form = FORM | {"rank": "clip", "number": 3, "temperature": 3}
    arguments = generate_arguments(form, own, LIMITS)
    result = generate(arguments, {}, shelf=own, watch=Watch(60))
    images = torch.stack([candidate.image for candidate in result.candidates])
    scores = ranker.similarities(images, ["олень"])[:, 0].tolist()
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    assert result.captions == [f"clip {score:.3g}" for score in scores]
    assert own.open(arguments).pipeline.clip is None and "--clip tiny" in result.command


@pytest.mark.skipif(sys.platform == "darwin", reason="the layouts are those of x86")
def test_half_weights_are_packed_again_for_another_number_of_rows(tmp_path: Path) -> None:
    half = ModelShelf(ShelfSettings(("shipped",), tmp_path, uri="", dtype="bfloat16"))
    models = [half.open(GenerateArguments(number=number)) for number in (2, 3, 8, 9)]
    assert models[0] is models[1] and models[2] is models[3] and models[0] is not models[2]


def test_attention_weights_give_the_output_of_the_layer(
    shelf: ModelShelf, deer: Inspection
) -> None:
    decoder = shelf.open(deer.arguments).pipeline.decoder
    tokens = deer.tokens[None]
    for number in (0, 2):
        layer: Any = decoder.layers[number]
        inputs: list[torch.Tensor] = []

        def keep(module: Any, given: Any, output: torch.Tensor, kept: Any = inputs) -> None:
            kept.append(output)

        hook = layer.attention_norm.register_forward_hook(keep)
        with torch.inference_mode():
            decoder.run_layers(tokens)
            hook.remove()
            view = FullView(decoder.layer_tables[number], 1)
            [key_value] = view.split(layer.project_qkv(inputs[0]))[1]
            weights = attention_weights(decoder, tokens, number)
            out = layer.to_out(view.merge(weights[0] @ key_value.value))
            torch.testing.assert_close(out, layer.attend(inputs[0], view), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="layer must be 0 to 5, got 6"):
        attention_weights(decoder, tokens, 6)


def test_greedily_sampled_tokens_have_probability_1(deer: Inspection) -> None:
    """Teacher forcing and the sampling loop agree, with guidance."""
    assert deer.chosen_probabilities.shape == (8, 8)
    assert np.allclose(deer.chosen_probabilities, 1)
    assert deer.probabilities.sum(1).numpy() == pytest.approx(1, abs=1e-5)


def test_the_attention_of_a_token_covers_text_and_image(
    shelf: ModelShelf, deer: Inspection
) -> None:
    source = shelf.open(deer.arguments)
    position = deer.position_at(319, 100)
    assert deer.names[position] == "row 3, column 8" and deer.grid_index(position) == 23
    assert deer.grid_index(0) is None
    view = attention_view(deer, source, layer=1, head=2, position=position)
    assert sum(view.fractions.values()) == pytest.approx(1, abs=1e-5)
    assert view.fractions["right text"] == 0
    assert "".join(name for name, _ in view.text if "<" not in name) == "оленьолень"
    # The column mask of layer 2 hides the last row.
    heat = np.asarray(view.image).astype(int)
    plain = np.asarray(to_image(deer.image).resize((320, 320), Image.Resampling.NEAREST))
    unattended = 0.35 * plain + 0.65 * 255
    assert np.abs(heat - unattended)[280:].max() < 1
    assert np.abs(heat - unattended)[:120, 280:].max() > 20
    for layer, head, place in ((1, 5, 0), (1, None, 102)):
        with pytest.raises(ValueError, match="expected 0 to"):
            attention_view(deer, source, layer=layer, head=head, position=place)


def test_a_replay_ends_with_the_image_and_shows_one_token_more_per_frame(
    deer: Inspection,
) -> None:
    frames = [np.asarray(frame).astype(int) for frame in replay_frames(deer)]
    assert len(frames) == 65 and (frames[0] == 128).all()
    final = to_image(deer.image).resize((320, 320), Image.Resampling.NEAREST)
    assert np.array_equal(frames[-1], np.asarray(final))
    for index in (0, 30, 63):
        rows, columns = np.nonzero((frames[index] != frames[index + 1]).any(2))
        assert {(row // 40, column // 40) for row, column in zip(rows, columns, strict=True)} == {
            divmod(index, 8)
        }


def test_the_masks_of_all_layers_are_drawn(shelf: ModelShelf, deer: Inspection) -> None:
    assert masks_image(shelf.open(deer.arguments)).width > 300


def test_claims_are_those_of_the_index() -> None:
    index = (RESULTS / "README.md").read_text("utf-8")
    rows = claim_rows(RESULTS / "masks")
    assert len(rows) >= 5
    for name, _, verdict, effect in rows:
        claim = re.escape(f"(masks/{name}/README.md)<br>") + ".* better than .*"
        assert re.search(f"{claim}{re.escape(f'| {verdict} | {effect} |')}", index)
    page = result_page(RESULTS, "masks/layer_pattern")
    assert "**Finding**" in page.text and "](" not in page.text and len(page.figures) == 3
    assert experiments_in(Path("nowhere")) == []
    with pytest.raises(ValueError, match="experiment: expected one in"):
        result_page(RESULTS, "../tests")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_taken_port_a_missing_gradio_and_bad_flags_are_one_line(
    taken_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for found, words in (
        ("", "address already in use"),
        (None, "gradio: expected the package, got none"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", {"gradio": found}.get)
        assert main(["demo", "--port", str(taken_port)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    for classes in (["кот", "кот"], ["кот", "пёс", "--question", "кто?"]):
        assert main(["caption", "image.png", "--classes", *classes]) == 2
        assert "rudolph: --classes: expected" in capsys.readouterr().err
    assert main(["demo", "--max-number", "0"]) == 2
    assert "--max-number: expected at least 1, got 0" in capsys.readouterr().err


def test_a_comparison_differs_in_the_model_alone(shelf: ModelShelf) -> None:
    arguments = generate_arguments(FORM, shelf, LIMITS)
    other = replace(arguments, model="another")
    assert other.command() == f"{arguments.command()} --model another".replace(
        "--number 2 --seed 5 --model another", "--model another --number 2 --seed 5"
    )
