"""Families that read documents: caches, training of some parts, runs, and few-shot evaluation."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from tiny_run import run_tiny
from torch.nn import functional as F

from rudolph.config.run import resolve_run
from rudolph.data.documents import DocumentFormat, Panel, batch_documents
from rudolph.data.splits import DataConfig, Splits
from rudolph.evaluation.context import EvaluationContext
from rudolph.evaluation.evaluators.few_shot import SHOT_COUNTS, few_shot, few_shot_text
from rudolph.families.documents import DocumentCapabilities, EmbeddingReader
from rudolph.families.interface import Capabilities
from rudolph.families.llava import image_of_question
from rudolph.families.registry import family_of
from rudolph.families.vision_language import encoder_pixels
from rudolph.files.settings import ConfigError
from rudolph.generation.documents import sample_document_answers, score_document_choices
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.vision.clip import VisionConfig
from rudolph.models.vision.features import PatchPixels
from rudolph.models.vision.vqgan_features import VQGANLatents
from rudolph.models.weights import read_weights
from rudolph.reports.report_cards import CARD, read_card
from rudolph.runs.resolve import open_clip, open_run
from rudolph.sequence.layout import EOS, PAD
from rudolph.training.language import gate_sizes
from rudolph.training.optim import OptimConfig, parameter_groups

VOCABULARY = 120
SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_size": 8, "mlp_size": 24}
LANGUAGE_MODEL = {"vocab_size": VOCABULARY + 1, "num_key_value_heads": 1, **SMALL}
VISION = {
    "vision": {
        "image_size": 24,
        "patch_size": 8,
        "width": 16,
        "num_layers": 1,
        "num_heads": 1,
        "mlp_width": 64,
    },
    "features": {"layers": [-1]},
    "language_model": LANGUAGE_MODEL,
}
RESAMPLER = {"width": 16, "num_layers": 1, "num_latents": 3, "num_heads": 2, "head_size": 4}
SECTIONS: dict[str, dict[str, Any]] = {
    "language_model": LANGUAGE_MODEL,
    "flamingo": {
        **VISION,
        "resampler": RESAMPLER,
        "cross_attention": {"num_heads": 2, "head_size": 4, "mlp_ratio": 2},
        "every": 1,
    },
    "llava": {**VISION, "connector": {"kind": "pool", "factor": 3}},
    "codes": {
        "family": "llava",
        "encoders": ["codes"],
        "connector": {"kind": "table"},
        "language_model": LANGUAGE_MODEL,
    },
    "latents and conv": {
        "family": "llava",
        "encoders": ["latents", "conv"],
        "conv": {"image_size": 24, "widths": [8, 8], "depths": [1, 1], "kernel_size": 3},
        "connector": {"kind": "shuffle", "factor": 3},
        "language_model": LANGUAGE_MODEL,
    },
    "patches": {
        "family": "llava",
        **VISION,
        "encoders": ["patches"],
        "connector": {"kind": "linear"},
        "image_attention": "bidirectional",
        "question_first": True,
    },
    "late fusion": {
        "family": "llava",
        **VISION,
        "connector": {"kind": "pool", "factor": 3},
        "late_fusion": {"kind": "gated"},
    },
}
READS_IMAGES = [name for name in SECTIONS if name != "language_model"]
TEXT_TASKS = {"new_words/text_question_answering": 1, "shapes/text_to_text": 1}
IMAGE_TASKS = {"new_words/image_captioning": 1, "shapes/image_captioning": 1}


def settings(case: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"family": case, **SECTIONS[case], **changes},
        "data.tasks": TEXT_TASKS if case == "language_model" else IMAGE_TASKS,
        "tokenizer": {"vocab_size": VOCABULARY, "num_specials": 0},
    }


@cache
def reader_of(family: str) -> Any:
    vqgan = flat({"vqgan": tiny_run.TINY["settings"]["vqgan"]})
    config = resolve_run(Path("x"), {"data.image_size": 24, **vqgan, **flat(settings(family))})
    adapter = family_of(config.model)
    torch.manual_seed(0)
    model = adapter.empty(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Open gates, and logits that differ between tokens.
            if name.endswith("_gate"):
                parameter.fill_(0.7)
            elif "language_model" in name or family == "language_model":
                parameter.mul_(4)
    return adapter.reader(config, model.eval()), adapter.document_format(config)


def flat(content: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with dotted keys, as overrides have them."""
    rows = {}
    for key, value in content.items():
        if isinstance(value, dict) and key != "data.tasks":
            rows |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            rows[key] = value
    return rows


def model_of(reader: Any) -> Any:
    """Return the LLaVA that embeds the documents of a reader."""
    models = [cell.cell_contents for cell in reader.embed.__closure__]
    return next(model for model in models if hasattr(model, "vision"))


class Letters:
    """A tokenizer with one id per character."""

    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [4 + ord(character) % 100 for character in text]


def documents(family: str, *, number: int = 3) -> Any:
    """Return prompts of different lengths, the first with two images."""
    reads = family != "language_model"
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(number + 1, 3, 24, 24, generator=generator)
    prompts = [[Panel(images[row] if reads else None, "ab" * row, None)] for row in range(number)]
    prompts[0] = [Panel(images[-1] if reads else None, "", "cd"), *prompts[0]]
    form: DocumentFormat = reader_of(family)[1]
    return batch_documents(prompts, form, Letters(), side="left")


def row_of(batch: Any, row: int) -> Any:
    """Return one document of a batch, without its padding."""
    is_token = batch.attention_mask[row].bool()
    parts = {
        name: getattr(batch, name)[row : row + 1][:, is_token]
        for name in ("input_ids", "attention_mask", "labels")
    }
    if batch.images is not None:
        present = batch.present[row]
        parts |= {
            "images": batch.images[row : row + 1, present],
            "present": present[None, present],
        }
    return batch._replace(**parts)


@pytest.mark.parametrize("family", SECTIONS)
def test_choices_score_what_a_whole_forward_pass_gives_them(family: str) -> None:
    reader, _ = reader_of(family)
    batch = documents(family)
    choices = [[[5, 6, EOS], [7, EOS]], [[8, EOS], [9, 10, 11, EOS]], [[5, EOS], [6, 6, EOS]]]
    found = score_document_choices(reader, batch, choices)
    for row, options in enumerate(choices):
        prompt = row_of(batch, row)
        length = prompt.input_ids.shape[1]
        for column, ids in enumerate(options):
            tokens = torch.cat([prompt.input_ids, torch.tensor([ids])], dim=1)
            whole = prompt._replace(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                labels=torch.cat([prompt.labels, torch.tensor([ids])], dim=1),
            )
            logits = reader.logits(whole)[0, length - 1 : -1]
            expected = -F.cross_entropy(logits, torch.tensor(ids), reduction="sum")
            torch.testing.assert_close(found[row, column], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", SECTIONS)
def test_sampled_answers_are_those_of_a_loop_without_a_cache(family: str) -> None:
    reader, form = reader_of(family)
    batch, allowed = documents(family), torch.ones(form.image_token_id + 1, dtype=torch.bool)
    allowed[[PAD, form.image_token_id]] = False
    shared = {"num_tokens": 5, "allowed": allowed}
    greedy = TokenSamplingConfig(top_k=1)
    found = sample_document_answers(reader, batch, config=greedy, seeds=[1, 2, 3], **shared)
    for row in range(3):
        whole = row_of(batch, row)
        for step in range(found.shape[1]):
            logits = reader.logits(whole)[0, -1].masked_fill(~allowed, -torch.inf)
            token = int(logits.argmax())
            assert token == int(found[row, step])
            if token == EOS:
                break
            tokens = F.pad(whole.input_ids, (0, 1), value=token)
            whole = whole._replace(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                labels=F.pad(whole.labels, (0, 1), value=token),
            )


@pytest.mark.parametrize("family", SECTIONS)
def test_an_answer_depends_on_its_seed_and_not_on_the_batch(family: str) -> None:
    reader, form = reader_of(family)
    allowed = torch.ones(form.image_token_id + 1, dtype=torch.bool)
    shared = {"config": TokenSamplingConfig(temperature=2.0), "num_tokens": 6, "allowed": allowed}
    batch = documents(family)
    together = sample_document_answers(reader, batch, seeds=[5, 6, 7], **shared)
    for row in range(3):
        alone = sample_document_answers(reader, row_of(batch, row), seeds=[5 + row], **shared)
        length = min(alone.shape[1], together.shape[1])
        assert torch.equal(alone[0, :length], together[row, :length])
    other = sample_document_answers(reader, batch, seeds=[8, 9, 10], **shared)
    assert not torch.equal(other, together)


@pytest.mark.parametrize("family", READS_IMAGES)
def test_an_answer_depends_on_the_image(family: str) -> None:
    reader, _ = reader_of(family)
    batch = documents(family)
    changed = batch._replace(images=1 - batch.images)
    assert not torch.allclose(reader.logits(batch), reader.logits(changed), atol=1e-3)


def test_a_fused_vector_depends_on_its_question_alone() -> None:
    reader, form = reader_of("late fusion")
    image = torch.rand(3, 24, 24)
    rows = [
        [Panel(image, "ab", "cd"), Panel(image, "ef", None)],
        [Panel(image, "ab", None)],
        [Panel(image, "", "cd"), Panel(image, "ba", None)],
    ]
    batch = batch_documents(rows, form, Letters(), side="left")
    owners = image_of_question(batch, form.image_token_id)
    assert [owners[0].tolist().count(image) for image in range(5)] == [2, 2, 0, 0, 0]
    assert [row[row >= 0].tolist() for row in owners] == [[0, 0, 1, 1], [2, 2], [4, 4]]
    vectors = reader.embed(batch)[batch.input_ids == form.image_token_id]
    # The mean of word embeddings ignores the order of the words.
    torch.testing.assert_close(vectors[0], vectors[2])
    torch.testing.assert_close(vectors[0], vectors[4])
    assert not torch.allclose(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[3])


def test_vectors_of_an_image_see_later_ones_only_under_bidirectional_attention() -> None:
    reader, form = reader_of("patches")
    batch = documents("patches")
    changed = batch.images.clone()
    changed[1, 0, :, -8:, -8:] += 0.5
    first = int((batch.input_ids[1] == form.image_token_id).nonzero()[0])
    differences = {}
    for name, spans in (("causal", None), ("bidirectional", reader.spans)):
        model = EmbeddingReader(reader.model, reader.embed, spans)
        before, after = (
            model.logits(batch._replace(images=x))[1] for x in (batch.images, changed)
        )
        differences[name] = (before - after).abs().amax(-1)
    assert differences["causal"][first] == 0 < differences["bidirectional"][first]
    # The question comes before the image and attends to none of its vectors.
    assert (differences["bidirectional"][:first] == 0).all() and first > 1
    assert (differences["causal"][-1] > 0).all()


def test_patches_are_the_pixels_of_the_image() -> None:
    config = VisionConfig(image_size=12, patch_size=4, width=8, num_heads=1, num_layers=1)
    images = torch.rand(2, 3, 12, 12)
    features = PatchPixels(config)(images)
    assert features.shape == (2, 9, 48)
    expected = images[1, :, 4:8, 8:12]
    assert torch.equal(features[1, 5].view(3, 4, 4), expected)


def test_codes_are_read_as_rudolph_reads_them() -> None:
    reader, form = reader_of("codes")
    batch = documents("codes")
    embedded = reader.embed(batch)
    model = model_of(reader)
    images = batch.images[batch.present]
    codes = model.vision.vqgan.encode_indices(images)
    expected = model.connector.embedding.weight[codes].flatten(0, 1)
    is_image = batch.input_ids == form.image_token_id
    torch.testing.assert_close(embedded[is_image], expected)
    latents = VQGANLatents(model.vision.vqgan)(encoder_pixels(images, 24))
    of_encoder = model.vision.vqgan.encoder(2 * images - 1)
    torch.testing.assert_close(latents[:, 4], of_encoder[:, :, 0, 4], atol=1e-5, rtol=1e-4)


def test_operations_are_those_of_the_weights_that_train() -> None:
    """Count by hand: 2 per weight and token forward, 2 for inputs and 2 for trained weights."""
    counts = {}
    for trained in ("connector", "without_vision"):
        reader, form = reader_of("llava")
        model = model_of(reader)
        model.train_only(trained)
        capabilities = DocumentCapabilities(
            model, reader, Letters(), form, device=torch.device("cpu"), max_new_tokens=3
        )
        counts[trained] = capabilities.count_operations(
            "image_captioning", ["abc", "abc"], images=torch.rand(2, 3, 24, 24)
        )
        assert not any(parameter.requires_grad for parameter in model.parameters())
    length = 1 + form.num_image_tokens + 4
    layers = sum(
        p.numel() for n, p in model.language_model.layers.named_parameters() if p.dim() == 2
    )
    difference = counts["without_vision"][0] - counts["connector"][0]
    head = model.language_model.config.hidden_size * (VOCABULARY + 1)
    assert difference == 2 * length * (layers + head)
    assert counts["without_vision"][1] == counts["connector"][1] < counts["connector"][0]


def test_gates_latents_and_norms_have_no_weight_decay() -> None:
    model = reader_of("flamingo")[0].model
    groups = parameter_groups(model, OptimConfig(optimizer="muon"))
    kept = {id(parameter) for parameter in groups.kept}
    for name, parameter in model.named_parameters():
        if name.endswith(("_gate", "latents")) or "norm" in name:
            assert id(parameter) in kept, name
    assert gate_sizes(model)["attn_gate"] == pytest.approx(np.tanh(0.7))


TINY = (
    "data.dataset=new_words",
    'data.new_words={"num_train": 70, "num_validation": 70, "num_test": 70, "max_shots": 2}',
    "evaluation.splits=[test]",
    "evaluation.num_examples=6",
    "evaluation.grid_prompts=[]",
)


def tiny(folder: Path, family: str, evaluators: list[str], **changes: Any) -> Path:
    """Return the folder of a finished tiny run of a family."""
    overrides = [
        f"{key}={json.dumps(value)}" for key, value in settings(family, **changes).items()
    ]
    overrides += ["tokenizer.bpe_dropout=0", f"evaluation.evaluators={json.dumps(evaluators)}"]
    return run_tiny(folder, (*TINY, *overrides, "optim.ema_decay=null"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    return tiny(folder, "language_model", ["few_shot_text", "text_answers"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    section = {
        "family": "clip",
        "embed_dim": 16,
        "image_resolution": 24,
        "vision_layers": 1,
        "vision_width": 16,
        "vision_patch_size": 8,
        "context_length": 24,
        "vocab_size": VOCABULARY,
        "transformer_width": 16,
        "transformer_heads": 2,
        "transformer_layers": 1,
    }
    overrides = (f"model={json.dumps(section)}", "evaluation.evaluators=[]")
    return run_tiny(tmp_path_factory.mktemp("clip"), (*overrides, "optim.ema_decay=null"))


def test_a_language_model_run_scores_its_episodes(language_model: Path) -> None:
    card = read_card(language_model / CARD).set_index("score")
    names = {f"few_shot_text/accuracy_{number}/test" for number in SHOT_COUNTS}
    assert names < set(card.index)
    assert card.loc["few_shot_text/accuracy_0/test", "chance"] == pytest.approx(1 / 8)
    assert card.loc["few_shot_text/accuracy_8/test", "chance"] == pytest.approx(1 / 2)
    capabilities, config = open_run(language_model)
    assert config.model.family == "language_model"
    scores = capabilities.loglikelihood(
        "text_question_answering", [["дакс", "вуг"]], questions=["красный круг"]
    )
    assert scores.shape == (1, 2) and (scores < 0).all()


@pytest.mark.parametrize("family", ["flamingo", "llava"])
def test_a_run_trains_only_what_its_stage_trains(
    family: str, language_model: Path, clip: Path, tmp_path: Path
) -> None:
    parts = {"vision": str(clip), "language_model": str(language_model)}
    folder = tiny(tmp_path, family, ["few_shot", "caption_f1"], parts=parts)
    weights = read_weights(folder / "checkpoints" / f"{family}.safetensors")
    frozen = read_weights(language_model / "checkpoints" / "language_model.safetensors")
    for name, value in frozen.items():
        assert torch.equal(weights[f"language_model.{name}"], value), name
    vision = open_clip(str(clip)).clip.state_dict()
    copied = [name for name in weights if name.startswith("vision.encoder.")]
    assert copied
    for name in copied:
        assert torch.equal(weights[name], vision["visual." + name.removeprefix("vision.encoder.")])
    if family == "flamingo":
        assert all(weights[name].abs() > 0 for name in weights if name.endswith("_gate"))
    card = read_card(folder / CARD).set_index("score")
    assert "few_shot/accuracy_shuffled/test" in card.index
    assert (folder / "checkpoints" / "bpe.model").read_bytes() == (
        language_model / "checkpoints" / "bpe.model"
    ).read_bytes()
    capabilities, _ = open_run(folder)
    images = torch.rand(2, 3, 24, 24)
    greedy = {"config": TokenSamplingConfig(top_k=1), "seeds": [1, 2]}
    assert len(capabilities.generate_text("image_captioning", images=images, **greedy)) == 2
    with pytest.raises(ValueError, match="image_captioning: expected images, got none"):
        capabilities.generate_text("image_captioning", **greedy)


@pytest.mark.parametrize("family", ["flamingo", "llava"])
def test_low_rank_updates_change_the_blocks_of_the_language_model_alone(
    family: str, language_model: Path, tmp_path: Path
) -> None:
    parts = {"language_model": str(language_model)}
    folder = tiny(tmp_path, family, [], parts=parts, lora_rank=2, lora_alpha=64)
    weights = read_weights(folder / "checkpoints" / f"{family}.safetensors")
    frozen = read_weights(language_model / "checkpoints" / "language_model.safetensors")
    for name, before in frozen.items():
        change = weights[f"language_model.{name}"] - before
        is_target = name.endswith("_proj.weight")
        assert bool(change.abs().max() > 0) == is_target, name
        if is_target:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name


def test_a_second_stage_starts_from_the_first_and_keeps_its_tokenizer(
    language_model: Path, tmp_path: Path
) -> None:
    first = tiny(tmp_path, "llava", [], parts={"language_model": str(language_model)})
    second = tiny(tmp_path, "llava", [], init=str(first), trained="without_vision")
    before, after = (
        read_weights(run / "checkpoints" / "llava.safetensors") for run in (first, second)
    )
    for name, value in before.items():
        is_kept = name.startswith("vision.")
        assert torch.equal(value, after[name]) == is_kept, name
    tokenizers = [(run / "checkpoints" / "bpe.model").read_bytes() for run in (first, second)]
    assert (
        tokenizers[0]
        == tokenizers[1]
        == (language_model / "checkpoints" / "bpe.model").read_bytes()
    )
    again = tiny(tmp_path, "language_model", [], init=str(language_model))
    assert (again / "checkpoints" / "bpe.model").read_bytes() == tokenizers[0]


@pytest.mark.parametrize("key", ["init", "parts"])
def test_a_missing_run_is_named_before_any_data_is_read(key: str, tmp_path: Path) -> None:
    source = "experiment:fusion/llava_shapes_stage1"
    changes = {"init": source} if key == "init" else {"parts": {"vision": source}}
    with pytest.raises(ValueError, match=r"llava_shapes_stage1\. Train it with `rudolph run exp"):
        tiny(tmp_path, "llava", [], **changes)
    assert not list((tmp_path / "runs" / ".cache").glob("*.npy"))


def test_choices_must_be_equally_many_for_each_text(language_model: Path) -> None:
    capabilities, _ = open_run(language_model)
    with pytest.raises(
        ValueError, match=r"choices: expected equally many for each text, got \[1, 2"
    ):
        capabilities.loglikelihood(
            "text_question_answering", [["дакс"], ["дакс", "вуг"]], questions=["круг", "круг"]
        )


def test_parts_of_another_shape_are_refused(
    language_model: Path, clip: Path, tmp_path: Path
) -> None:
    parts = {"vision": None, "language_model": str(language_model)}
    wide = {**LANGUAGE_MODEL, "mlp_size": 32}
    with pytest.raises(ValueError, match=r"model\.language_model: expected the settings of .*24"):
        tiny(tmp_path, "flamingo", [], parts=parts, language_model=wide)
    deep = {**VISION["vision"], "num_layers": 2}
    parts = {"vision": str(clip), "language_model": None}
    with pytest.raises(ValueError, match=r"model\.vision: expected VisionConfig\(.*num_layers=1"):
        tiny(tmp_path, "llava", [], parts=parts, vision=deep)
    parts = {"vision": str(language_model), "language_model": None}
    with pytest.raises(ValueError, match="expected a CLIP, got a LanguageModel"):
        tiny(tmp_path, "llava", [], parts=parts)


def test_settings_that_do_not_fit_are_refused() -> None:
    def resolve(family: str, **changes: Any) -> None:
        resolve_run(Path("x"), {"data.image_size": 24, **flat(settings(family)), **changes})

    with pytest.raises(ConfigError, match=r"model\.language_model\.vocab_size: expected 121, one"):
        resolve("flamingo", **{"model.language_model.vocab_size": 120})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected 121"):
        resolve("language_model", **{"model.vocab_size": 120})
    with pytest.raises(ConfigError, match=r"data\.tasks\.image_captioning: .* cannot read images"):
        resolve("language_model", **{"data.tasks": {"image_captioning": 1}})
    with pytest.raises(ConfigError, match=r"data\.tasks\.text_to_image: .* cannot generate im"):
        resolve("llava", **{"data.tasks": {"text_to_image": 1}})
    with pytest.raises(ConfigError, match=r"model\.resampler\.width: expected 16, the channels"):
        resolve("flamingo", **{"model.resampler.width": 8})
    with pytest.raises(ConfigError, match=r"question_answering: expected a task with images, sin"):
        resolve("llava", **{"data.tasks": {"shapes_questions/text_question_answering": 1}})
    resolve(
        "llava",
        **{"model.trained": "all", "data.tasks": {"shapes_questions/text_question_answering": 1}},
    )
    with pytest.raises(
        ConfigError, match=r"tokenizer\.bpe_dropout: must be 0 for family flamingo"
    ):
        resolve("flamingo", **{"tokenizer.bpe_dropout": 0.1})
    with pytest.raises(ConfigError, match=r"parts: expected none with init"):
        resolve("flamingo", **{"model.init": "runs/x", "model.parts": {"vision": "runs/y"}})
    with pytest.raises(ConfigError, match=r"model\.offset must lie in \[0, 2\), got 2"):
        resolve("flamingo", **{"model.offset": 2})
    with pytest.raises(ConfigError, match=r"model\.factor: expected a divisor of the grid 3x3"):
        resolve("llava", **{"model.connector.factor": 2})
    for changes, message in (
        ({"encoders": []}, "encoders: expected different encoders, got"),
        ({"encoders": ["codes", "vit"]}, "encoders: expected codes alone, got"),
        ({"encoders": ["codes"]}, "connector.kind: expected table for encoder codes, got pool"),
        ({"connector.kind": "table"}, "connector.kind: table needs encoder codes, got"),
        (
            {"late_fusion.kind": "gated", "scores_questions": True},
            "scores_questions: expected f",
        ),
        (
            {"late_fusion.kind": "gated", "connector.kind": "mlp"},
            "connector: expected one vec",
        ),
        ({"late_fusion.kind": "gmu", "question_first": True}, "question_first: expected false"),
        ({"lora_rank": 2, "trained": "all"}, "lora_rank: expected null where trained includes"),
        ({"late_fusion.kind": "sum"}, "kind: expected one of additive, .*got 'sum'"),
        ({"encoders": ["conv", "vit"]}, "encoders: expected one image size for all, got"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve("llava", **{f"model.{key}": value for key, value in changes.items()})
    with pytest.raises(ConfigError, match=r"encoders: expected none of codes, which family llava"):
        resolve("flamingo", **{"model.encoders": ["codes"]})
    with pytest.raises(ConfigError, match=r"caption_f1 shows images, which family language_model"):
        resolve("language_model", **{"evaluation.evaluators": ["caption_f1"]})
    with pytest.raises(ConfigError, match=r"missing_image: legacy needs a model that generates"):
        resolve("llava", **{"evaluation.missing_image": "legacy"})
    with pytest.raises(ConfigError, match=r"few_shot needs a model with loglikelihood_after"):
        resolve_run(
            Path("x"),
            {"data.dataset": "new_words", "data.image_size": 256}
            | {"evaluation.evaluators": ["few_shot"]},
        )


class Oracle(Capabilities):
    """A model that compares colours and shapes exactly and guesses evenly otherwise."""

    def loglikelihood_after_shots(
        self,
        task: str,
        choices: Any,
        shots: Any,
        *,
        images: Any = None,
        questions: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        rows = []
        for row, (options, shown) in enumerate(zip(choices, shots, strict=True)):
            known = {panel.question or None: panel.answer for panel in shown}
            words = [known.get(questions[row])] if questions[row] in known else options
            excluded = set(known.values()) - set(words) if words is not options else set()
            if words is options:
                excluded = set(known.values())
            rows.append(
                [0.0 if word in words and word not in excluded else -9.0 for word in options]
            )
        return torch.tensor(rows)


def test_the_shot_curve_of_an_oracle_is_that_of_an_ideal_observer(tmp_path: Path) -> None:
    data = DataConfig(dataset="new_words", image_size=24, tasks={"image_captioning": 1.0})
    split = Splits(data, tmp_path)("test")
    context = EvaluationContext(
        Oracle(), TokenSamplingConfig(), TokenSamplingConfig(), num_examples=500, seed=0
    )
    scores = {score.metric: score for score in few_shot_text(context, split)}
    for number in SHOT_COUNTS:
        unseen = 0.5**number
        other = 1 / 8 if number == 0 else 1 / 7
        expected = 1 - unseen + unseen * other
        score = scores[f"few_shot_text/accuracy_{number}"]
        assert score.value == pytest.approx(expected, abs=0.05)
        assert score.chance == (1 / 8 if number == 0 else 1 / 2)


def test_controls_change_images_alone(tmp_path: Path) -> None:
    data = DataConfig(dataset="new_words", image_size=24, tasks={"image_captioning": 1.0})
    split = Splits(data, tmp_path)("test")
    calls: list[Any] = []

    def record(task: str, choices: Any, shots: Any, **rest: Any) -> torch.Tensor:
        calls.append((shots, rest["images"]))
        return torch.zeros(len(choices), len(choices[0]))

    model: Any = SimpleNamespace(loglikelihood_after_shots=record)
    context = EvaluationContext(
        model, TokenSamplingConfig(), TokenSamplingConfig(), num_examples=7, seed=0
    )
    scores = few_shot(context, split)
    assert [score.metric.rpartition("_")[2] for score in scores[-2:]] == ["shuffled", "blank"]
    plain, shuffled, blank = calls[SHOT_COUNTS.index(8)], *calls[-2:]
    assert torch.equal(shuffled[1], plain[1].roll(-1, 0))
    assert (blank[1] == 0.5).all()
    for control in (shuffled, blank):
        for before, after in zip(plain[0], control[0], strict=True):
            assert [panel.answer for panel in before] == [panel.answer for panel in after]
    for row, shown in enumerate(plain[0]):
        others = shuffled[0][row - 1]
        assert all(
            torch.equal(*(p.image for p in pair)) for pair in zip(shown, others, strict=True)
        )
        assert all((panel.image == 0.5).all() for panel in blank[0][row])


def test_images_that_a_document_lacks_are_not_encoded() -> None:
    reader, _ = reader_of("flamingo")
    batch = documents("flamingo")
    memory = reader.memory(batch)
    padded = reader.model.memory(
        reader.model.latents(encoder_pixels(batch.images, 24), None), batch.present
    )
    assert torch.equal(memory.numbers, padded.numbers)
    encoded: list[int] = []
    hook = reader.model.vision.register_forward_hook(
        lambda module, inputs, output: encoded.append(len(inputs[0]))
    )
    logits = reader.logits(batch)
    hook.remove()
    assert encoded == [int(batch.present.sum())] and encoded[0] < batch.present.numel()
    hidden = reader.model.hidden(batch.input_ids, padded, batch.attention_mask)
    torch.testing.assert_close(logits, reader.model.language_model.logits(hidden))
