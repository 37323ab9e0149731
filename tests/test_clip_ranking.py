"""Ranking by CLIP: Pillow's resizing, text ends, template means, batches and retrieval."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rudolph.generation.clip_ranking import (
    PLAIN_TEMPLATES,
    TEMPLATES,
    ClipRanker,
    retrieval_ranks,
    retrieval_recalls,
)
from rudolph.models.vision.clip import CLIP, MEAN, STD, CLIPConfig
from rudolph.sequence.layout import BOS, EOS, PAD
from rudolph.sequence.tokenizer import Tokenizer

SIDE, CONTEXT = 12, 14
TEXTS = ["красный круг", "", "Синий  КВАДРАТ ", "зелёный круг и " * 5]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("clip") / "bpe.model"
    return Tokenizer.train([*TEXTS, *TEMPLATES], vocab_size=120, path=path)


def ranker(tokenizer: Tokenizer, *, side: int = SIDE, **changes: object) -> ClipRanker:
    torch.manual_seed(3)
    config = CLIPConfig(
        embed_dim=10,
        image_resolution=side,
        vision_layers=2,
        vision_width=16,
        vision_patch_size=4,
        context_length=CONTEXT,
        vocab_size=tokenizer.vocab_size,
        transformer_width=12,
        transformer_heads=2,
        transformer_layers=2,
    )
    clip = CLIP(config)
    with torch.no_grad():
        # At initialisation, CLIP embeds all texts almost alike.
        for parameter in clip.transformer.parameters():
            parameter.mul_(8)
        clip.ln_final.weight.normal_()
    return ClipRanker(clip, tokenizer, **changes)


def photograph(height: int, width: int) -> Image.Image:
    """Return a smooth image with an edge and noise, which reveals errors of resizing."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    noise = np.random.default_rng(height + 1000 * width).uniform(-30, 30, (height, width, 3))
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y), (x > 0.45) * 2 - 1.0]
    pixels = 128 + 90 * np.stack(waves, axis=-1) + noise
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def random_images(number: int) -> Tensor:
    return torch.rand(number, 3, 16, 20, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(40, 40), (61, 38), (37, 90), (12, 12), (7, 9), (12, 33)])
def test_pixels_are_those_of_pillow(tokenizer, size: tuple[int, int]) -> None:
    image = photograph(*size)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    expected = to_tensor(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    found = ranker(tokenizer).pixel_values(to_tensor(image)[None])[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert found.shape == (3, SIDE, SIDE)
    # Pillow rounds to integers after each direction.
    assert (found * std + mean - expected).abs().max() < 3 / 255
    uneven = image.crop((left, top, left + side - 1, top + side - 1)).resize((SIDE, SIDE))
    assert (to_tensor(uneven) - expected).abs().max() > 3 / 255


def test_a_text_keeps_both_ends_however_long_it_is(tokenizer) -> None:
    ids = ranker(tokenizer).input_ids(TEXTS)
    assert ids.shape == (4, CONTEXT) and ids[:, 0].tolist() == [BOS] * 4
    assert (ids == EOS).sum(1).tolist() == [1] * 4
    for row, text in zip(ids.tolist(), TEXTS, strict=True):
        inner = tokenizer.encode(text)[: CONTEXT - 2]
        assert row == [BOS, *inner, EOS] + [PAD] * (CONTEXT - 2 - len(inner))
    assert ids[3, -1] == EOS and len(tokenizer.encode(TEXTS[3])) > CONTEXT


def test_text_features_are_the_mean_over_templates_before_they_are_normalised(tokenizer) -> None:
    own = ranker(tokenizer, batch_size=3)
    assert own.templates == TEMPLATES and len(TEMPLATES) == 6
    found = own.text_features(TEXTS)
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            features = [
                own.clip.encode_text(own.input_ids([template.format(text)]))[0]
                for template in TEMPLATES
            ]
        rows.append(F.normalize(torch.stack(features).mean(0), dim=0))
        early = F.normalize(F.normalize(torch.stack(features), dim=1).mean(0), dim=0)
        assert (early - rows[-1]).abs().max() > 1e-3
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_results_do_not_depend_on_the_batch_and_progress_is_told(tokenizer) -> None:
    whole, told = ranker(tokenizer, batch_size=64), []
    images, classes = random_images(5), TEXTS[:3]
    expected = whole.classify(images, classes)
    torch.testing.assert_close(expected.sum(1), torch.ones(5))
    for batch_size in (1, 2, 5):
        parts = ranker(tokenizer, batch_size=batch_size)
        torch.testing.assert_close(parts.classify(images, classes), expected)
        told.clear()
        found = parts.similarities(images, classes, on_batch=lambda *step: told.append(step))
        torch.testing.assert_close(found, whole.similarities(images, classes))
        assert told == [(min(end, 5), 5) for end in range(batch_size, 5 + batch_size, batch_size)]


def test_without_templates_it_is_the_model_itself(tokenizer) -> None:
    plain, images = ranker(tokenizer, templates=PLAIN_TEMPLATES), random_images(4)
    with torch.no_grad():
        logits, _ = plain.clip(plain.input_ids(TEXTS), plain.pixel_values(images))
    similar = plain.similarities(images, TEXTS)
    torch.testing.assert_close(similar * plain.clip.logit_scale.exp().item(), logits)
    torch.testing.assert_close(plain.classify(images, TEXTS), logits.softmax(1))
    assert similar.abs().max() <= 1 and similar.std() > 0.01


def test_it_tells_apart_colours_when_it_is_made_for_them(tokenizer) -> None:
    """Hand-set weights: attention carries words to the text end, colours to the class token."""
    own, words = ranker(tokenizer, templates=PLAIN_TEMPLATES), ("красный", "зелёный", "синий")
    tokens = [tokenizer.encode(word)[0] for word in words]
    assert len(set(tokens)) == 3
    clip = own.clip
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            parameter.fill_(float("ln_" in name and name.endswith("weight")))
        clip.token_embedding.weight[tokens] = torch.eye(3, 12)
        clip.visual.conv1.weight[:3] = torch.eye(3)[:, :, None, None]
        for tower, width in ((clip, 12), (clip.visual, 16)):
            attention = tower.transformer.resblocks[0].attn
            attention.in_proj_weight[-width:] = attention.out_proj.weight[:] = torch.eye(width)
        for projection in (clip.text_projection, clip.visual.proj):
            projection[:3] = torch.eye(3, 10)
    images = torch.eye(3)[:, :, None, None].expand(-1, -1, 15, 22)
    texts = [f"круг и {word}" for word in words]
    assert own.similarities(images, texts).argmax(1).tolist() == [0, 1, 2]
    assert own.similarities(images, texts).argmax(0).tolist() == [0, 1, 2]
    assert own.classify(images[1:], words).argmax(1).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_images_give_nearly_the_same(tokenizer, dtype) -> None:
    expected = ranker(tokenizer).similarities(random_images(3), TEXTS)
    half = ranker(tokenizer)
    half.clip.to(dtype)
    found = half.similarities(random_images(3).to(dtype), TEXTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_features_are_the_models_own_and_normalised_they_are_those_of_an_image(tokenizer) -> None:
    own, images = ranker(tokenizer, batch_size=2), random_images(5)
    with torch.no_grad():
        expected = own.clip.encode_image(own.pixel_values(images))
    torch.testing.assert_close(own.features(images), expected)
    torch.testing.assert_close(own.image_features(images), F.normalize(expected, dim=1))
    assert (expected.norm(dim=1) - 1).abs().min() > 0.01


CAPTIONS = [3, 1, 3, 0, 1, 3, 2]


def ranks_by_hand(similarities: np.ndarray, asked: list[int], answers: list[int]) -> list[int]:
    ranks = []
    for row, own in zip(similarities, asked, strict=True):
        best = max(value for value, caption in zip(row, answers, strict=True) if caption == own)
        wrong = [value for value, caption in zip(row, answers, strict=True) if caption != own]
        ranks.append(1 + sum(value >= best for value in wrong))
    return ranks


def test_ranks_count_wrong_answers_that_are_as_similar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rudolph.generation.clip_ranking.MAX_QUERIES_IN_MEMORY", 3)
    # Integers, so that many similarities are equal.
    draw = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randint(-2, 3, (n, 3), generator=draw).float() for n in (7, 9))
    answers = [*CAPTIONS, 1, 2]
    right = (torch.tensor(CAPTIONS)[:, None] == torch.tensor(answers)).nonzero()
    found = retrieval_ranks(queries, gallery, right)
    assert found.tolist() == ranks_by_hand((queries @ gallery.t()).numpy(), CAPTIONS, answers)
    assert 1 in found.tolist() and max(found.tolist()) > 3


def test_a_shared_caption_is_one_text_and_any_of_its_images_answers_it() -> None:
    texts = torch.eye(3)[[0, 1, 0, 2]]
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0.5, 0.4]])
    # The third and fourth images share the second text; each text retrieves one of its images.
    recalls = retrieval_recalls(
        images, texts, torch.arange(4), torch.tensor([5, 7, 5, 8]), top_ks=(1, 2, 3)
    )
    assert recalls == {
        "image_to_text/recall_at_1": 0.5,
        "image_to_text/recall_at_2": 0.75,
        "image_to_text/recall_at_3": 1.0,
        "text_to_image/recall_at_1": 1.0,
        "text_to_image/recall_at_2": 1.0,
        "text_to_image/recall_at_3": 1.0,
    }


def test_a_shared_image_is_one_image_and_any_of_its_captions_answers_it() -> None:
    images = torch.eye(3)[[0, 0, 1, 2]]
    texts = torch.tensor([[0.0, 1, 0], [0.9, 0, 0.1], [0, 0.8, 0], [0, 0.6, 0.7]])
    # The first image retrieves its second caption; the first text ranks another image before its
    # own.
    recalls = retrieval_recalls(
        images, texts, torch.tensor([4, 4, 1, 9]), torch.arange(4), top_ks=(1, 2)
    )
    assert recalls == {
        "image_to_text/recall_at_1": 2 / 3,
        "image_to_text/recall_at_2": 1.0,
        "text_to_image/recall_at_1": 0.75,
        "text_to_image/recall_at_2": 0.75,
    }


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_features_that_are_all_alike_find_nothing(value: float) -> None:
    same = torch.full((6, 4), value)
    recalls = retrieval_recalls(same, same, torch.arange(6), torch.arange(6), top_ks=(1, 5, 6))
    assert [recalls[f"image_to_text/recall_at_{k}"] for k in (1, 5, 6)] == [0, 0, 1]
