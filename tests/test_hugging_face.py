"""Image-text-to-text models of Hugging Face: a tiny random LLaVA against plain forward passes."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import write
from torch import Tensor

from rudolph.cli import main
from rudolph.data.documents import Panel
from rudolph.families.hugging_face import HuggingFaceCapabilities, open_hugging_face
from rudolph.generation.filters import TokenSamplingConfig

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
TEXT = "<pad> <s> </s> <unk> <image> Q A красный синий круг квадрат что это ? да нет"
WORDS = TEXT.split()
PAD, BOS, EOS = 0, 1, 2
SIDE, PATCH, NUM_NEW = 24, 8, 6
# A template that writes the first token itself, and white space before an answer.
TEMPLATE = (
    "<s>{% for message in messages %}{{ ' Q' if message.role == 'user' else ' A' }}"
    "{% for part in message.content %} {{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} A{% endif %}"
)
CHOICES = [["красный круг", "да"], ["синий", "синий квадрат ?"], ["нет", "круг"]]
QUESTIONS = ["что это ?", "это красный квадрат или синий круг ?", "круг ?"]


def tokenizer_of(side: str) -> Any:
    """Return a tokenizer of words, whose documents start with ``<s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side=side,
        model_input_names=["input_ids", "attention_mask"],
    )


def llava() -> Any:
    """Return a tiny random LLaVA; large weights make its tokens vary."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.5,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>")
    )
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = [EOS, WORDS.index("?")]
    return model


def save_model(folder: Path, *, side: str = "right", template: str | None = None) -> Path:
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer_of(side),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    llava().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("right", None), ("left", TEMPLATE)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    side, template = request.param
    return save_model(tmp_path_factory.mktemp("hf"), side=side, template=template)


@pytest.fixture(scope="module")
def capabilities(folder: Path) -> HuggingFaceCapabilities:
    return open_hugging_face(folder, device=CPU, max_new_tokens=NUM_NEW)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def shots_of(images: Tensor) -> list[list[Panel]]:
    """Return two shots, none and one."""
    shown = [
        Panel(images[1], "это круг ?", "да"),
        Panel(images[2], "это синий квадрат ?", "нет"),
    ]
    return [shown, [], shown[:1]]


def expected_text(panels: list[Panel], *, is_chat: bool) -> str:
    """Return the words of a document after ``<s>``."""
    words = []
    for panel in panels:
        image = ["<image>"] * (panel.image is not None)
        if is_chat:
            words += ["Q", *image, panel.question, "A"]
        else:
            words += [*image, panel.question]
        words += [panel.answer] if panel.answer is not None else []
    return " ".join(words)


def plain_logits(
    capabilities: HuggingFaceCapabilities, panels: list[Panel], tokens: list[int]
) -> Tensor:
    """Return the logits ``(S + 1, V)`` after a document and each of some tokens."""
    text = expected_text(panels, is_chat=capabilities.is_chat)
    text = text.replace("<image>", " ".join(["<image>"] * (SIDE // PATCH) ** 2))
    ids = [BOS, *(WORDS.index(word) if word in WORDS else 3 for word in text.split())]
    pixels = [
        transformers.CLIPImageProcessorPil(
            do_resize=False, crop_size={"height": SIDE, "width": SIDE}
        )((panel.image * 255).round().byte().numpy(), return_tensors="pt")["pixel_values"]
        for panel in panels
        if panel.image is not None
    ]
    with torch.inference_mode():
        logits = capabilities.model(
            input_ids=torch.tensor([ids + tokens]), pixel_values=torch.cat(pixels)
        ).logits
    return logits[0, len(ids) - 1 :]


def plain_loglikelihood(
    capabilities: HuggingFaceCapabilities, panels: list[Panel], answer: str
) -> float:
    tokens = [WORDS.index(word) for word in answer.split()]
    log_probs = plain_logits(capabilities, panels, tokens).log_softmax(-1)
    total = sum(float(row[token]) for row, token in zip(log_probs, tokens, strict=False))
    ends = log_probs[-1].exp()[[EOS, WORDS.index("?")]]
    return total + float(ends.sum().log())


def test_loglikelihoods_are_those_of_single_rows(
    capabilities: HuggingFaceCapabilities, images: Tensor
) -> None:
    shots = shots_of(images)
    arguments = {"images": images, "questions": QUESTIONS}
    scores = capabilities.loglikelihood_after_shots(
        "question_answering", CHOICES, shots, **arguments
    )
    for row, choices in enumerate(CHOICES):
        document = [*shots[row], Panel(images[row], QUESTIONS[row], None)]
        for column, choice in enumerate(choices):
            expected = plain_loglikelihood(capabilities, document, choice)
            assert scores[row, column].item() == pytest.approx(expected, abs=1e-4)
    numbers: list[tuple[int, int]] = []
    capabilities.batch_size = 1
    single = capabilities.loglikelihood(
        "question_answering",
        CHOICES,
        **arguments,
        on_batch=lambda done, total: numbers.append((done, total)),
    )
    capabilities.batch_size = 8
    batch = capabilities.loglikelihood("question_answering", CHOICES, **arguments)
    torch.testing.assert_close(single, batch, rtol=1e-4, atol=1e-4)
    assert numbers == [(1, 3), (2, 3), (3, 3)]
    assert batch[1, 0].item() == pytest.approx(scores[1, 0].item(), abs=1e-4)
    assert abs(batch[0, 0].item() - scores[0, 0].item()) > 1e-3


def test_a_prompt_is_read_once_for_all_its_choices(
    capabilities: HuggingFaceCapabilities, images: Tensor
) -> None:
    encoded: list[int] = []
    tower = capabilities.model.get_submodule("model.vision_tower")
    hook = tower.register_forward_hook(
        lambda module, inputs, output: encoded.append(len(output.last_hidden_state))
    )
    capabilities.loglikelihood_after_shots(
        "question_answering",
        [["да", "нет", "круг", "синий круг"]] * 3,
        shots_of(images),
        images=images,
        questions=QUESTIONS,
    )
    hook.remove()
    assert encoded == [3, 1, 2]


def greedy_text(capabilities: HuggingFaceCapabilities, panels: list[Panel]) -> str:
    """Return the most likely next words up to an end, without images or unknown ids."""
    tokens: list[int] = []
    while len(tokens) < NUM_NEW and (not tokens or tokens[-1] not in (EOS, WORDS.index("?"))):
        logits = plain_logits(capabilities, panels, tokens)[-1, : len(WORDS)].clone()
        logits[WORDS.index("<image>")] = -torch.inf
        tokens.append(int(logits.argmax()))
    return " ".join(WORDS[token] for token in tokens if token > WORDS.index("<image>"))


def test_greedy_texts_are_those_of_a_plain_loop(
    capabilities: HuggingFaceCapabilities, images: Tensor
) -> None:
    texts = capabilities.generate_text(
        "question_answering",
        config=TokenSamplingConfig(top_k=1),
        seeds=[1, 2, 3],
        images=images,
        questions=QUESTIONS,
    )
    documents = [
        [Panel(image, question, None)] for image, question in zip(images, QUESTIONS, strict=True)
    ]
    assert texts == [greedy_text(capabilities, document).strip() for document in documents]
    assert len(set(texts)) > 1 and all(texts)
    shots = shots_of(images)
    after_shots = capabilities.generate_text_after_shots(
        "question_answering",
        shots,
        config=TokenSamplingConfig(top_k=1),
        seeds=[1, 2, 3],
        images=images,
        questions=QUESTIONS,
    )
    assert after_shots == [
        greedy_text(capabilities, [*shown, *document]).strip()
        for shown, document in zip(shots, documents, strict=True)
    ]
    assert after_shots[0] != texts[0] and after_shots[1] == texts[1]


def test_a_sampled_text_depends_on_its_seed_alone(
    capabilities: HuggingFaceCapabilities, images: Tensor
) -> None:
    def sample(seeds: list[int], **settings: Any) -> list[str]:
        return capabilities.generate_text(
            "image_captioning",
            config=TokenSamplingConfig(temperature=2.0),
            seeds=seeds,
            images=images[:1].expand(len(seeds), -1, -1, -1),
            **settings,
        )

    texts = sample([7, 8, 9, 10, 11])
    assert len(set(texts)) > 1
    assert sample([9]) == texts[2:3] and sample([11, 8]) == [texts[4], texts[1]]
    for text in sample([7, 8, 9], allowed_characters="данет"):
        assert set(text) <= set("данет ?")


def test_images_and_questions_must_suit_the_task(
    capabilities: HuggingFaceCapabilities, images: Tensor
) -> None:
    with pytest.raises(ValueError, match="image_captioning: expected images, got none"):
        capabilities.loglikelihood("image_captioning", [["да"]])
    with pytest.raises(ValueError, match=r"expected equally many for each text, got \[1, 2\]"):
        capabilities.loglikelihood("image_captioning", [["да"], ["да", "нет"]], images=images[:2])
    with pytest.raises(ValueError, match=r"max_position_embeddings: expected room for \d+ pos"):
        capabilities.loglikelihood("image_captioning", [["да " * 130]], images=images[:1])


def card_arguments(folder: Path, model: Path, *settings: str) -> list[str]:
    evaluators = ["caption_f1", "shapes_questions/answer_f1"]
    questions = {"num_train": 8, "num_validation": 8, "num_test": 8}
    return [
        "report-card",
        f"hf:{model}",
        "--experiment",
        str(write(folder)),
        f"evaluation.evaluators={json.dumps(evaluators)}",
        f"data.shapes_questions={json.dumps(questions)}",
        "evaluation.splits=[test]",
        *settings,
    ]


def test_the_command_prints_and_writes_a_report_card(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = card_arguments(tmp_path, folder)
    assert main([*arguments, "--output", "cards/llava.csv"]) == 0
    printed = capsys.readouterr().err
    card = pd.read_csv("cards/llava.csv").set_index("score")
    names = {
        "image_to_text/token_f1/test",
        "image_to_text/caption_accuracy/test",
        "shapes_questions/answers/exact_match/test",
    }
    assert names <= set(card.index)
    assert all(name in printed for name in names)
    assert (card["count"] > 0).all()


def test_mistakes_of_the_command_are_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = card_arguments(tmp_path, folder)
    for arguments, message in (
        (card_arguments(tmp_path, tmp_path / "none"), "none: expected a folder with a model, got"),
        ([*plain, "evaluation.evaluators=[scene_accuracy]"], "needs a model with generate_image"),
        ([*plain, "evaluation.missing_image=legacy"], "legacy needs a model that generates im"),
        ([*plain, "evaluation.evaluators=[]"], "expected evaluators, got none"),
        ([*plain, "--output", "card.txt"], "--output: expected a file FILE.csv, got card.txt"),
        (
            [*plain[:2], "evaluation.evaluators=[]", *plain[2:4]],
            "expected evaluators, got none",
        ),
        (plain[:2], "--experiment: expected a file with data and evaluation, got none"),
        ([*plain[:2], "shipped", *plain[2:4]], "expected no other run to compare with, got sh"),
        (["report-card", "shipped", *plain[2:4]], "--experiment: expected hf:FOLDER to evaluate"),
    ):
        assert main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("rudolph: ") and message in line, line
    assert not list((tmp_path / "runs").rglob("*.npy"))


def test_a_folder_that_cannot_be_evaluated_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(folder: Path) -> str:
        with pytest.raises(ValueError) as caught:
            open_hugging_face(folder, device=CPU)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    empty, text, blind = (tmp_path / name for name in ("empty", "text", "blind"))
    empty.mkdir()
    assert "expected an image-text-to-text model with its processor, got" in fault(empty)
    llava().model.language_model.save_pretrained(text)
    assert "got model_type llama" in fault(text)
    save_model(blind)
    weights = blind / "model.safetensors"
    for file in blind.iterdir():
        if "processor" in file.name:
            file.unlink()
    assert "image processor" in fault(blind)
    save_model(blind)
    with monkeypatch.context() as patch:
        tokenizer = tokenizer_of("left")
        patch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer)
        assert "got TokenizersBackend without an image processor" in fault(blind)
    tensors = load_file(weights)
    name = next(name for name in tensors if "multi_modal_projector" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    assert "got no weights of" in fault(blind)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"expected the package transformers, .*pip install tra"):
        open_hugging_face(blind, device=CPU)
