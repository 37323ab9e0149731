"""Readers of documents: caches, what each family reads, and the operations it needs."""

import numpy as np
import pytest
import torch
from small_documents import (
    READS_IMAGES,
    SECTIONS,
    VOCABULARY,
    Letters,
    documents,
    model_of,
    reader_of,
    row_of,
)
from torch.nn import functional as F

from rudolph.data.documents import Panel, batch_documents
from rudolph.families.documents import DocumentCapabilities, EmbeddingReader
from rudolph.families.llava import image_of_question
from rudolph.families.vision_language import encoder_pixels
from rudolph.generation.documents import sample_document_answers, score_document_choices
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.vision.clip import VisionConfig
from rudolph.models.vision.features import PatchPixels
from rudolph.models.vision.vqgan_features import VQGANLatents
from rudolph.sequence.layout import EOS, PAD
from rudolph.training.language import gate_sizes
from rudolph.training.optim import OptimConfig, parameter_groups


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
