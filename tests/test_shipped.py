"""The shipped emoji model: small, described correctly, and usable at once."""

import json
import tomllib
from glob import glob
from pathlib import Path

import pytest
from PIL import Image

from rudolph.cli import main
from rudolph.config.run import read_run
from rudolph.data.datasets.emoji import Emoji
from rudolph.reports.report import generated_part
from rudolph.reports.report_cards import read_card
from rudolph.reports.schema import CARD
from rudolph.runs.packing import MODEL_CARD, model_card
from rudolph.runs.resolve import SHIPPED_RUN

ROOT = Path(__file__).parent.parent


def test_it_is_packaged_and_at_most_25_megabytes() -> None:
    files = [path for path in SHIPPED_RUN.rglob("*") if path.is_file()]
    # Outputs of commands and notebooks belong elsewhere.
    assert not [path for path in files if path.suffix == ".svg"]
    assert sum(path.stat().st_size for path in files) <= 25e6
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {
        ROOT / "rudolph" / "checkpoints" / name
        for pattern in package["package-data"]["rudolph.checkpoints"]
        for name in glob(pattern, root_dir=ROOT / "rudolph" / "checkpoints", recursive=True)
    }
    assert set(files) <= packaged


def test_its_model_card_is_that_of_its_files_and_holds_its_score_table() -> None:
    card = SHIPPED_RUN / MODEL_CARD
    assert generated_part(card) == model_card(SHIPPED_RUN)
    by_hand = card.read_text().partition("<!--")[0]
    for word in ("Noto Color Emoji", "OFL-1.1", "CLDR", "Apache-2.0"):
        assert word in by_hand
    scores = read_card(SHIPPED_RUN / CARD)
    assert (scores[["low", "high"]].notna().all(axis=1) & (scores["count"] > 0)).all()


def test_a_text_alone_draws_and_a_image_alone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "олень", "-n", "3"]) == 0
    lines = Path("generated.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    record = json.loads(lines[0])
    assert record["model"] == "shipped" and record["prompt"] == "олень"
    with Image.open(record["file"]) as image:
        assert image.size == (64, 64)
    data = read_run(SHIPPED_RUN / "config.yaml").data
    emoji = Emoji(data.emoji, split="train", image_size=data.image_size)
    images = {pair.caption: pair.image for pair in emoji}
    for name in ("олень", "пицца"):
        images[name].save("image.png")
        capsys.readouterr()
        assert main(["caption", "image.png", "-n", "4"]) == 0
        assert name in capsys.readouterr().out


def test_its_report_card_is_drawn_outside_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(SHIPPED_RUN.rglob("*"))
    assert main(["report-card", "shipped"]) == 0
    assert "text_to_image/nearest_1_percent/train" in capsys.readouterr().err
    assert sorted(SHIPPED_RUN.rglob("*")) == before
    assert [path.suffix for path in (tmp_path / "runs" / ".cache").rglob("report_card.s*")]
