"""Images of a run: any text is drawn, and a failed image does not fail the run."""

import errno
import random
from dataclasses import replace
from pathlib import Path

import pytest
from fuzzing import num_cases, random_text
from PIL import Image

from rudolph.config.run import RunConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.reports.style import DrawingWarning
from rudolph.runs.resolve import load_run
from rudolph.runs.samples import generate_prompts, grid_prompts_of, warn_of_unknown
from rudolph.sequence.texts import UnknownTextWarning


@pytest.fixture(scope="module")
def run(finished: Path) -> tuple[Pipeline, RunConfig]:
    return load_run(finished)


def with_prompts(config: RunConfig, *prompts: str) -> RunConfig:
    evaluation = replace(config.evaluation, grid_prompts=prompts, grid_samples=1)
    return replace(config, evaluation=evaluation)


def test_a_grid_of_prompts_with_control_characters_is_drawn(
    run: tuple[Pipeline, RunConfig], tmp_path: Path
) -> None:
    pipeline, config = run
    for name, prompt in {"plain": "красный круг", "control": "красный\x85круг"}.items():
        generate_prompts(pipeline, with_prompts(config, prompt), tmp_path / f"{name}.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "control.png").read_bytes()


def test_any_prompt_is_drawn(run: tuple[Pipeline, RunConfig], tmp_path: Path) -> None:
    pipeline, config = run
    rng = random.Random(0)
    for first in range(0, num_cases(10), 10):
        prompts = [random_text(rng, longest=rng.choice([3, 60, 900])) for _ in range(10)]
        prompts = [prompt.encode("utf-8", "replace").decode() for prompt in prompts]
        path = tmp_path / f"{first}.png"
        generate_prompts(pipeline, with_prompts(config, *prompts), path)
        with Image.open(path) as image:
            image.load()
            assert image.width > 0 and image.height > 0


def test_a_grid_that_cannot_be_written_is_a_warning_and_leaves_no_file(
    run: tuple[Pipeline, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, config = run

    def full(self: Image.Image, path: Path, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    path = tmp_path / "grid.png"
    with pytest.warns(DrawingWarning, match=r"grid.png: cannot be drawn \(No space left"):
        generate_prompts(pipeline, config, path)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_the_tokenizer_cannot_read_is_named_before_training(
    run: tuple[Pipeline, RunConfig],
) -> None:
    pipeline, config = run
    warn_of_unknown(config, pipeline.tokenizer)
    asked = with_prompts(config, "красный круг", "a red cat")
    with pytest.warns(UnknownTextWarning, match=r"^evaluation.grid_prompts\[1\]: .* 'red'"):
        warn_of_unknown(asked, pipeline.tokenizer)
    captions = replace(asked, data=replace(asked.data, tasks={"image_captioning": 1.0}))
    assert grid_prompts_of(captions) == ()


def test_a_prompt_that_is_not_utf_8_is_a_mistake_of_the_file(
    run: tuple[Pipeline, RunConfig],
) -> None:
    with pytest.raises(ValueError, match=r"^grid_prompts\[0\]: expected text in UTF-8"):
        with_prompts(run[1], "кот \ud83d")
