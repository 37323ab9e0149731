"""A run that trains a CLIP: its recalls, its files, and the commands that rank with it."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import run_tiny

from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext
from rudolph.evaluation.evaluators.retrieval import retrieval
from rudolph.families.clip import CLIPCapabilities
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.reports.report_cards import read_card
from rudolph.reports.schema import CARD
from rudolph.runs.resolve import load_run, newest_run, open_clip

CLIP = {
    "embed_dim": 16,
    "image_resolution": 24,
    "vision_layers": 1,
    "vision_width": 16,
    "vision_patch_size": 8,
    "context_length": 24,
    "vocab_size": 120,
    "transformer_width": 16,
    "transformer_heads": 2,
    "transformer_layers": 1,
}
OPTIM = {"num_steps": 6, "global_batch_size": 8, "validate_every": 3, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = (
        f"model={json.dumps({'family': 'clip', **CLIP})}",
        f"optim={json.dumps(OPTIM)}",
        "evaluation.evaluators=[retrieval]",
        "evaluation.splits=[test]",
        "evaluation.num_examples=6",
    )
    return run_tiny(tmp_path_factory.mktemp("clip"), overrides)


def test_a_run_trains_a_clip_and_asks_it_to_retrieve(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["status"] == "finished"
    card = read_card(trained / CARD).set_index("score")
    names = [
        f"{way}/recall_at_{k}/test" for way in ("image_to_text", "text_to_image") for k in (1, 5)
    ]
    assert sorted(card.index) == sorted(names)
    assert card.loc["text_to_image/recall_at_1/test", "chance"] == pytest.approx(1 / 6)
    assert card.loc["text_to_image/recall_at_5/test", "chance"] == pytest.approx(5 / 6)
    [path] = trained.parent.parent.glob(".cache/clip-*/curves.jsonl")
    curves = path.read_text()
    assert "clip/val/image_to_text/recall_at_1" in curves


def test_a_run_of_a_clip_is_a_source_of_one(trained: Path, finished: Path) -> None:
    ranker = open_clip(str(trained))
    _, config = load_run(finished)
    images = torch.rand(3, 3, config.data.image_size, config.data.image_size)
    found = ranker.similarities(images, ["красный круг", "синий крест"])
    assert found.shape == (3, 2) and ranker.templates == ("{}",)
    assert ranker.features(images).shape == (3, 16)
    with pytest.raises(ValueError, match="expected a run that trained a CLIP"):
        open_clip(str(finished))
    # A CLIP generates no images, so `generate` must not choose it by default.
    with pytest.raises(ValueError, match="expected a finished run, got none"):
        newest_run(trained.parent.parent)


def test_retrieval_counts_as_a_sorted_list_does(trained: Path, finished: Path) -> None:
    ranker, (_, config) = open_clip(str(trained)), load_run(finished)
    split = Split(config.data, "train", finished.parent.parent / ".cache")
    sampling = TokenSamplingConfig()
    context = EvaluationContext(CLIPCapabilities(ranker), sampling, sampling, 30, 0)
    scores = {each.metric: each for each in retrieval(context, split)}
    captions = split.captions[:30]
    texts = sorted(set(captions))
    assert len(texts) < 30, "no caption is shared"
    similar = ranker.similarities(split.image_batch(range(30)), texts)
    by_image, by_text = (
        table.argsort(dim=1, descending=True).tolist() for table in (similar, similar.t())
    )
    ranks = {
        "image_to_text": [
            row.index(texts.index(caption))
            for row, caption in zip(by_image, captions, strict=True)
        ],
        # Other images of the same text are correct too: only unrelated images before the first
        # count.
        "text_to_image": [
            next(rank for rank, at in enumerate(row) if captions[at] == text)
            for row, text in zip(by_text, texts, strict=True)
        ],
    }
    for way, found in ranks.items():
        for k in (1, 5):
            share = sum(rank < k for rank in found) / len(found)
            assert scores[f"{way}/recall_at_{k}"].value == pytest.approx(share)
            assert scores[f"{way}/recall_at_{k}"].num_examples == len(found)
