"""Small models of families that read documents, and documents for them."""

from functools import cache
from pathlib import Path
from typing import Any

import tiny_run
import torch

from rudolph.config.run import resolve_run
from rudolph.data.documents import DocumentFormat, Panel, batch_documents
from rudolph.families.registry import family_of
from rudolph.sequence.layout import EOS

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


def build_reader(family: str) -> Any:
    """Return a new model, its reader and the format of its documents."""
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
    return model, adapter.reader(config, model.eval()), adapter.document_format(config)


@cache
def reader_of(family: str) -> Any:
    """Return the reader and the format of the documents of a model."""
    return build_reader(family)[1:]


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
    """A tokenizer with one id per character; other ids become other characters."""

    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [4 + ord(character) % 100 for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(1000 + token) for token in ids if token > EOS)


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
