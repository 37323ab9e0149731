"""Image-text-to-text models of Hugging Face, evaluated like the families of this package.

A folder holds what ``transformers.AutoModelForImageTextToText`` and ``AutoProcessor`` load.
Nothing is downloaded.  A document is a list of panels.  A panel has an image, a question and an
answer, each optional; the last panel has no answer yet.  If the processor has a chat template, the
prompt is a chat: each panel becomes a message with its image and question, and the answer is the
reply.  Without a template, each panel becomes one line, ``<image token> question answer``.

Any of the model's ``eos_token_id`` ends an answer.

Shapes: B texts, C choices, T positions, S tokens of a choice, N new tokens, V vocabulary, H and W
pixels.
"""

import inspect
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rudolph.data.documents import Panel, prompt_panels
from rudolph.families.documents import AnswerCapabilities
from rudolph.generation.answering import OnToken
from rudolph.generation.documents import count_choices
from rudolph.generation.filters import TokenSamplingConfig, next_probabilities, sample_token
from rudolph.generation.noise import uniform_numbers
from rudolph.generation.png import to_image

# Maximum number of characters that a message quotes from an error of transformers.
MAX_REASON = 160
# Errors that transformers raises for a folder that it cannot load.
LOADING_ERRORS = (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class ImagePrompt(NamedTuple):
    """The text of a prompt, with a placeholder per image, and its images."""

    text: str
    images: list[Image.Image]


class TokenSampler:
    """A logits processor of ``generate`` that keeps one token per row, sampled by our filters.

    Args:
        config: How tokens are sampled.
        uniform: Uniform numbers ``(B, N)``, one per new token.
        allowed: A bool mask ``(V,)`` of the ids that a text may contain.  Ids from V on are not
            allowed.
    """

    def __init__(self, config: TokenSamplingConfig, uniform: Tensor, allowed: Tensor) -> None:
        self.config, self.uniform, self.allowed, self.number = config, uniform, allowed, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)`` that are minus infinity except at the sampled tokens."""
        is_allowed = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        is_allowed[: len(self.allowed)] = self.allowed[: scores.shape[-1]]
        logits = scores.masked_fill(~is_allowed, -torch.inf)
        uniform = self.uniform[:, self.number]
        tokens = sample_token(next_probabilities(logits, self.config), uniform)
        self.number += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class HuggingFaceCapabilities(AnswerCapabilities):
    """Answers of an image-text-to-text model: generated texts, or likelihoods of given choices.

    Args:
        model: The model.
        processor: Its processor, with ``image_processor`` and ``tokenizer``.
        name: Name for messages.
        max_new_tokens: Maximum number of tokens of a generated answer.
        batch_size: Texts, or choices of one text, per batch.

    Raises:
        ValueError: If there is neither a chat template nor an image token, or no ``eos_token_id``.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        max_new_tokens: int = 64,
        batch_size: int = 8,
    ) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.tokenizer = processor.tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.image_token = getattr(processor, "image_token", None)
        self.is_chat = bool(getattr(processor, "chat_template", None))
        if not self.is_chat and not isinstance(self.image_token, str):
            raise ValueError(f"{name}: expected a chat template or an image token, got neither")
        self.end_ids = _end_ids(model, self.tokenizer)
        if not self.end_ids:
            raise ValueError(f"{name}/config.json: expected eos_token_id, got none")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.end_ids[0])
        self.separator = self._separator()
        self.allowed_ids = lru_cache(self._allowed_ids)
        # Releases of transformers differ in the name.
        has_cache = "cache" in inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if has_cache else "past_key_values"

    def generate_text_after_shots(
        self,
        task: str,
        shots: Sequence[Sequence[Panel]],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        allowed_characters: str | None = None,
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Generate one text per seed, each after some shots.

        Raises:
            ValueError: If images or questions do not suit the task, or a prompt is too long.
        """
        panels = prompt_panels(task, shots, images=images, questions=questions)
        prompts = [self.prompt(document) for document in panels]
        allowed = self.allowed_ids(allowed_characters)
        uniform = uniform_numbers(seeds, self.max_new_tokens)
        texts: list[str] = []
        for first in range(0, len(prompts), self.batch_size):
            rows = slice(first, first + self.batch_size)
            texts += self._generate(prompts[rows], config, uniform[rows], allowed)
            if on_token is not None:
                on_token(len(texts), len(prompts))
        return texts

    def loglikelihood_after_shots(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        shots: Sequence[Sequence[Panel]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Compute the log-likelihood ``(B, C)`` in nats of each choice after the given shots.

        The log-likelihood includes the end of the answer.

        Raises:
            ValueError: If images or questions do not suit the task, if the numbers of choices
                differ, or if a prompt is too long.
        """
        count_choices(choices)
        panels = prompt_panels(task, shots, images=images, questions=questions)
        scores = []
        for document, answers in zip(panels, choices, strict=True):
            scores.append(self.score(self.prompt(document), answers))
            if on_batch is not None:
                on_batch(len(scores), len(choices))
        return torch.stack(scores)

    @torch.inference_mode()
    def score(self, prompt: ImagePrompt, answers: Sequence[str]) -> Tensor:
        """Return the log-likelihood ``(C,)`` in nats of each answer; the prompt is read once.

        A token that begins in the prompt and ends in an answer counts as the answer's.

        Raises:
            ValueError: If the processor changes the end of a text, or a text is too long.
        """
        from transformers import DynamicCache

        wholes = [prompt.text + self.separator + answer for answer in answers]
        before, *ids = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt.text, *wholes)
        )
        starts = [_num_shared(before, whole) for whole in ids]
        shared = min(starts)
        longest = max(range(len(ids)), key=lambda number: len(ids[number]))
        inputs = self.inputs([prompt._replace(text=wholes[longest])], side="right")
        length = inputs["input_ids"].shape[1] - len(ids[longest]) + shared
        if length < 1 or inputs["input_ids"][0, length:].tolist() != ids[longest][shared:]:
            raise ValueError(
                f"{self.name}: expected a processor that ends a text with its answer, "
                f"got other tokens than those of {wholes[longest][len(prompt.text) :]!r}"
            )
        cache = DynamicCache(config=self.model.config.get_text_config())
        read = {self.cache_argument: cache, "use_cache": True}
        last = self.model(**_first_tokens(inputs, length), **read).logits[:, -1:]  # (1, 1, V)
        scores = []
        for first in range(0, len(ids), self.batch_size):
            rows = slice(first, first + self.batch_size)
            answer_ids = [whole[shared:] for whole in ids[rows]]
            log_probs = self._answer_log_probs(answer_ids, cache, last, length=length)
            for row, tokens, start in zip(log_probs, answer_ids, starts[rows], strict=True):
                own = torch.tensor(tokens[start - shared :], dtype=torch.long).to(row.device)
                nats = row[start - shared : len(tokens)].gather(1, own[:, None])
                scores.append(nats.sum() + row[len(tokens), self.end_ids].logsumexp(0))
        return torch.stack(scores).cpu()

    def _answer_log_probs(
        self, answer_ids: Sequence[Sequence[int]], cache: Any, last: Tensor, *, length: int
    ) -> Tensor:
        """Return the log-probabilities ``(C, S + 1, V)`` before and after each token of answers.

        Args:
            answer_ids: Tokens of each answer.
            cache: The keys and values of the prompt, which are kept.
            last: Logits ``(1, 1, V)`` after the prompt.
            length: Number of tokens in the prompt.
        """
        number = len(answer_ids)
        tokens = pad_sequence([torch.tensor(row) for row in answer_ids], batch_first=True)
        lengths = torch.tensor([length + len(row) for row in answer_ids])
        mask = torch.arange(length + tokens.shape[1]) < lengths[:, None]
        copies = deepcopy(cache)
        copies.batch_repeat_interleave(number)
        logits = self.model(
            input_ids=tokens.to(last.device),
            attention_mask=mask.long().to(last.device),
            use_cache=True,
            **{self.cache_argument: copies},
        ).logits
        whole = torch.cat([last.expand(number, -1, -1), logits], dim=1)
        return whole.float().log_softmax(-1)

    def prompt(self, panels: Sequence[Panel]) -> ImagePrompt:
        """Return the prompt of a document, whose last panel has no answer."""
        images = [to_image(panel.image) for panel in panels if panel.image is not None]
        if self.is_chat:
            text = self.processor.apply_chat_template(
                _messages(panels), tokenize=False, add_generation_prompt=True
            )
            return ImagePrompt(text, images)
        lines = []
        for panel in panels:
            image = "" if panel.image is None else self.image_token
            parts = (image, panel.question, panel.answer)
            lines.append(" ".join(part for part in parts if part))
        return ImagePrompt("\n".join(lines), images)

    def inputs(self, prompts: Sequence[ImagePrompt], *, side: str, num_new: int = 0) -> Any:
        """Return the model's inputs for some texts, padded on one side, on the model's device.

        Args:
            prompts: The texts with their images.
            side: ``left`` or ``right``.
            num_new: Number of tokens that will be appended.

        Raises:
            ValueError: If the model has too few positions.
        """
        images = [prompt.images for prompt in prompts]
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=[prompt.text for prompt in prompts],
            images=images if any(images) else None,
            padding=True,
            padding_side=side,
            # A chat template may write the first token itself.
            add_special_tokens=not (bos and prompts[0].text.startswith(bos)),
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1] + num_new
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"{self.name}/config.json: max_position_embeddings: expected room for {length} "
                f"positions, got {limit}"
            )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    @torch.inference_mode()
    def _generate(
        self,
        prompts: Sequence[ImagePrompt],
        config: TokenSamplingConfig,
        uniform: Tensor,
        allowed: Tensor,
    ) -> list[str]:
        """Generate one text per prompt."""
        from transformers import GenerationConfig, LogitsProcessorList

        # A model's own configuration may penalise or force tokens.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        device = self.model.device
        sampler = TokenSampler(config, uniform.to(device), allowed.to(device))
        inputs = self.inputs(prompts, side="left", num_new=self.max_new_tokens)
        tokens = self.model.generate(**inputs, logits_processor=LogitsProcessorList([sampler]))
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            self.tokenizer.decode(row, skip_special_tokens=True).strip()
            for row in answers.tolist()
        ]

    def _separator(self) -> str:
        """Return the white space between a prompt and its answer."""
        if not self.is_chat:
            return " "
        panel = Panel(None, "x", None)
        prompt = self.prompt([panel]).text
        answered = self.processor.apply_chat_template(
            _messages([panel._replace(answer="x")]), tokenize=False
        )
        answer = answered[len(prompt) :] if answered.startswith(prompt) else ""
        return answer[: len(answer) - len(answer.lstrip())]

    def _allowed_ids(self, characters: str | None) -> Tensor:
        """Return a bool mask ``(V,)`` of the ids that a text may contain, never the image token.

        Args:
            characters: The only characters that texts may have besides spaces; None allows all.
        """
        is_allowed = torch.ones(len(self.tokenizer), dtype=torch.bool)
        if characters is not None:
            legal = {*characters, " "}
            for token in range(len(is_allowed)):
                is_allowed[token] = set(self.tokenizer.decode([token])) <= legal
        if isinstance(self.image_token, str):
            is_allowed[self.tokenizer.convert_tokens_to_ids(self.image_token)] = False
        is_allowed[self.end_ids] = True
        return is_allowed


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal ids at the start of two texts."""
    pairs = zip(first, second, strict=False)
    is_other = (number for number, (one, other) in enumerate(pairs) if one != other)
    return next(is_other, min(len(first), len(second)))


def _first_tokens(inputs: Any, length: int) -> dict[str, Any]:
    """Return a model's inputs with the first tokens of their only text."""
    shape = inputs["input_ids"].shape
    return {
        name: value[:, :length] if getattr(value, "shape", None) == shape else value
        for name, value in inputs.items()
    }


def _messages(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return panels as chat messages: the user's questions and the assistant's answers."""
    messages: list[dict[str, Any]] = []
    for panel in panels:
        content = [] if panel.image is None else [{"type": "image"}]
        if panel.question:
            content.append({"type": "text", "text": panel.question})
        messages.append({"role": "user", "content": content})
        if panel.answer is not None:
            answer = [{"type": "text", "text": panel.answer}]
            messages.append({"role": "assistant", "content": answer})
    return messages


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer, or an empty list if there are none."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def open_hugging_face(
    folder: Path, *, device: torch.device, max_new_tokens: int = 64
) -> HuggingFaceCapabilities:
    """Load an image-text-to-text model and its processor from a folder; download nothing.

    Args:
        folder: A folder with ``config.json``, weights and the files of the processor.
        device: Where the model computes.
        max_new_tokens: Maximum number of tokens of a generated answer.

    Raises:
        ValueError: If there is no such model or transformers is not installed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a model, got no such folder")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "hf: expected the package transformers, got none. Run `pip install transformers`"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **is_local)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(f"model_type {config.model_type}")
        if config.is_encoder_decoder:
            raise ValueError(f"model_type {config.model_type}, an encoder with a decoder")
        processor = transformers.AutoProcessor.from_pretrained(folder, **is_local)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"{type(processor).__name__} without an image processor")
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, output_loading_info=True, **is_local
        )
        if report["missing_keys"]:
            raise ValueError(f"no weights of {sorted(report['missing_keys'])[0]}")
    except LOADING_ERRORS as error:
        # The first sentence gives the reason; later sentences suggest a download.
        reason = " ".join(str(error).split()).partition(". ")[0][:MAX_REASON]
        raise ValueError(
            f"{folder}: expected an image-text-to-text model with its processor, got {reason}"
        ) from error
    return HuggingFaceCapabilities(
        model.eval().to(device), processor, name=str(folder), max_new_tokens=max_new_tokens
    )
