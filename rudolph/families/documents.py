"""The shared base of families that read documents: settings, examples, training, capabilities.

A document is a sequence of texts and images (``data/documents.py``).  A family of this kind adds
its ``model`` section, builds its network, and returns a ``DocumentReader`` for that network.
``families/vision_language.py`` has the base of the families that also read images.

Shapes: B documents, M images per document, C choices, S x S pixels, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rudolph.data.documents import (
    DocumentBatch,
    DocumentExamples,
    DocumentFormat,
    Panel,
    batch_documents,
    prompt_panels,
)
from rudolph.data.splits import Splits, has_documents
from rudolph.families.interface import (
    Capabilities,
    ModelSection,
    Parts,
    RunSettings,
    TrainingFlags,
)
from rudolph.families.single_file import SingleFileFamily
from rudolph.files.constraints import Count, errors_under
from rudolph.generation.answering import OnToken
from rudolph.generation.documents import (
    DocumentReader,
    answer_losses,
    count_choices,
    sample_document_answers,
    score_document_choices,
)
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.layers.partly_trained import PartlyTrained
from rudolph.models.lm.decode import at_last_token
from rudolph.models.lm.language_model import LanguageModel, LanguageModelCache
from rudolph.models.weights import meta_device
from rudolph.sequence.layout import EOS
from rudolph.sequence.tasks import TASKS
from rudolph.sequence.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rudolph.training.language import LanguageTraining


@dataclass(frozen=True)
class DocumentSection(ModelSection):
    """Fields of the ``model`` section of every family that reads documents.

    Attributes:
        max_length: Maximum number of positions of a document, image tokens included.
        max_new_tokens: Maximum number of tokens of a generated answer.
        scores_questions: Whether training also predicts questions, not only answers.
        question_first: Whether a question comes before its image.  Under a causal mask, the
            image's tokens can then attend to the question.
    """

    max_length: Count = 512
    max_new_tokens: Count = 24
    scores_questions: bool = False
    question_first: bool = False

    @property
    def tokenizer_source(self) -> str | None:
        """Return the source of the tokenizer whose ids the weights use."""
        return self.init

    @property
    def trains_on_texts(self) -> bool:
        """Return whether a document without images changes any weight in training."""
        return True


class TextState:
    """The state of a language model that has read documents; see ``DocumentState``."""

    def __init__(self, model: LanguageModel, cache: LanguageModelCache, logits: Tensor) -> None:
        self.model, self.cache, self.logits = model, cache, logits

    def append(self, tokens: Tensor) -> Tensor:
        """Read tokens ``(B, S)`` and return the logits ``(B, S, V)`` after each token."""
        return self.model(tokens, cache=self.cache)

    def repeat(self, number: int) -> "TextState":
        """Return the state with every document repeated ``number`` times; copies are adjacent."""
        logits = self.logits.repeat_interleave(number, 0)
        return TextState(self.model, self.cache.repeat(number), logits)


class EmbeddingReader:
    """A language model that reads embeddings of documents; see ``DocumentReader``.

    Args:
        model: The language model.
        embed: Returns the inputs of the language model: tokens ``(B, T)`` or embeddings.
        spans: Returns ``(B, T)``: the spans whose positions attend in both directions, as in
            ``causal_mask``.  None for a causal model.
    """

    def __init__(
        self,
        model: LanguageModel,
        embed: Callable[[DocumentBatch], Tensor],
        spans: Callable[[DocumentBatch], Tensor] | None = None,
    ) -> None:
        self.model, self.embed, self.spans = model, embed, spans

    def hidden(self, documents: DocumentBatch, cache: LanguageModelCache | None = None) -> Tensor:
        """Return the output ``(B, T, D)`` of the last block."""
        return self.model.hidden(
            self.embed(documents),
            attention_mask=documents.attention_mask,
            cache=cache,
            spans=None if self.spans is None else self.spans(documents),
        )

    def logits(self, documents: DocumentBatch) -> Tensor:
        """Return the logits ``(B, T, V)`` of all positions."""
        return self.model.logits(self.hidden(documents))

    def read(self, documents: DocumentBatch, *, num_new: int) -> TextState:
        """Read documents and return a state with room for ``num_new`` more tokens."""
        size, length = documents.input_ids.shape
        cache = self.model.new_cache(size, num_positions=length + num_new)
        last = at_last_token(self.hidden(documents, cache), documents.attention_mask)
        return TextState(self.model, cache, self.model.logits(last))


class AnswerCapabilities(Capabilities):
    """Capabilities of a model that answers after shots, and so also after none."""

    def generate_text(
        self,
        task: str,
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        allowed_characters: str | None = None,
        missing_image: TokenSamplingConfig | None = None,
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Generate one text per seed; see ``Capabilities.generate_text``."""
        return self.generate_text_after_shots(
            task,
            no_shots(len(seeds)),
            config=config,
            seeds=seeds,
            images=images,
            questions=questions,
            allowed_characters=allowed_characters,
            on_token=on_token,
        )

    def loglikelihood(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Compute the log-likelihood ``(B, C)`` in nats of each choice as the text of a task."""
        return self.loglikelihood_after_shots(
            task,
            choices,
            no_shots(len(choices)),
            images=images,
            questions=questions,
            on_batch=on_batch,
        )


def no_shots(number: int) -> list[list[Panel]]:
    """Return the shots of a number of documents without shots."""
    return [[] for _ in range(number)]


class DocumentCapabilities(AnswerCapabilities):
    """Answers to documents: generated texts, or the likelihoods of given choices.

    Args:
        model: The model.
        reader: Its reader.
        tokenizer: Its tokenizer.
        document_format: How the model reads documents.
        device: Where the model computes.
        max_new_tokens: Maximum number of tokens of a generated answer.
        batch_size: Documents per batch.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: DocumentReader,
        tokenizer: Tokenizer,
        document_format: DocumentFormat,
        *,
        device: torch.device,
        max_new_tokens: int,
        batch_size: int = 64,
    ) -> None:
        self.model, self.reader = model, reader
        self.tokenizer, self.format = tokenizer, document_format
        self.device, self.max_new_tokens, self.batch_size = device, max_new_tokens, batch_size

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
        """Generate one text per seed, each after some shots."""
        prompts = prompt_panels(task, shots, images=images, questions=questions)
        allowed = self.allowed_ids(allowed_characters)
        texts: list[str] = []
        for rows in self.batches(prompts):
            tokens = sample_document_answers(
                self.reader,
                self.documents(prompts[rows]),
                config=config,
                seeds=seeds[rows],
                num_tokens=self.max_new_tokens,
                allowed=allowed,
            )
            texts += [self.tokenizer.decode(row) for row in tokens.tolist()]
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
        """Compute the log-likelihood ``(B, C)`` in nats of each choice after the given shots."""
        prompts = prompt_panels(task, shots, images=images, questions=questions)
        ids = [[[*self.tokenizer.encode(text), EOS] for text in row] for row in choices]
        scores = []
        for rows in self.batches(prompts, copies=count_choices(choices)):
            batch = self.documents(prompts[rows])
            scores.append(score_document_choices(self.reader, batch, ids[rows]).cpu())
            if on_batch is not None:
                on_batch(min(rows.stop, len(prompts)), len(prompts))
        return torch.cat(scores)

    def count_operations(
        self,
        task: str,
        answers: Sequence[str],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
    ) -> tuple[float, float]:
        """Count the operations per example; see ``Capabilities.count_operations``."""
        shots = no_shots(len(answers))
        prompts = prompt_panels(task, shots, images=images, questions=questions)
        answered = [
            [panel._replace(answer=answer) for panel in prompt]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        # Gradients are off after training; the count needs those of the trained parts.
        self.model.requires_grad_(True)
        if isinstance(self.model, PartlyTrained):
            self.model.train_only(self.model.trained)
        with torch.enable_grad(), FlopCounterMode(display=False) as training:
            loss: Any = answer_losses(self.reader, self.documents(answered))[0].mean()
            loss.backward()
        self.model.requires_grad_(False)
        self.model.zero_grad()
        ids = [[[*self.tokenizer.encode(answer), EOS]] for answer in answers]
        with FlopCounterMode(display=False) as answering:
            score_document_choices(self.reader, self.documents(prompts), ids)
        number = len(answers)
        return training.get_total_flops() / number, answering.get_total_flops() / number

    def batches(self, rows: Sequence[Any], *, copies: int = 1) -> Iterator[slice]:
        """Yield the slice of each batch of at most ``batch_size`` rows, copies included."""
        size = max(self.batch_size // copies, 1)
        for first in range(0, len(rows), size):
            yield slice(first, first + size)

    def documents(self, prompts: Sequence[Sequence[Panel]]) -> DocumentBatch:
        """Return prompts as one batch, padded on the left, on the model's device."""
        return batch_documents(prompts, self.format, self.tokenizer, side="left").to(self.device)

    def allowed_ids(self, characters: str | None) -> Tensor:
        """Return a bool mask ``(V,)`` of the ids that an answer may contain: words and ``EOS``.

        Args:
            characters: The only characters that words may have besides spaces; None allows all.
        """
        is_allowed = torch.zeros(self.format.image_token_id + 1, dtype=torch.bool)
        is_allowed[EOS : self.tokenizer.vocab_size] = True
        if characters is not None:
            for token in range(EOS + 1, self.tokenizer.vocab_size):
                is_allowed[token] = set(self.tokenizer.decode([token])) <= {*characters, " "}
        return is_allowed


class DocumentFamily(SingleFileFamily):
    """The members of ``families.interface.Family`` that all readers of documents share."""

    capabilities: type[Capabilities] = DocumentCapabilities

    def reader(self, run: RunSettings, model: Any) -> DocumentReader:
        """Return the reader of a model."""
        raise NotImplementedError

    def document_format(self, run: RunSettings) -> DocumentFormat:
        """Return how the model reads documents; the id of the image token follows the BPE ids."""
        section = run.model
        return DocumentFormat(
            run.tokenizer.vocab_size, 1, section.max_length, section.question_first
        )

    def check(self, run: RunSettings) -> None:
        """Check that the model has an embedding per id, and that it can learn the tasks.

        Raises:
            ValueError: If a check fails; the message names the setting.
        """
        key, config = self.language_model_config(run.model)
        expected = run.tokenizer.vocab_size + 1
        if config.vocab_size != expected:
            raise ValueError(
                f"{key}.vocab_size: expected {expected}, one more than tokenizer.vocab_size for "
                f"images, got {config.vocab_size}"
            )
        for entry in run.data.mixture:
            image = TASKS[entry.task].image
            if image == "drawn" or (image == "given" and not self.reads_images):
                verb = "generate" if image == "drawn" else "read"
                raise ValueError(
                    f"data.tasks.{entry.name}: family {self.stage} cannot {verb} images"
                )
            if image == "none" and not run.model.trains_on_texts:
                raise ValueError(
                    f"data.tasks.{entry.name}: expected a task with images, since model.trained "
                    f"{run.model.trained} leaves the language model as it is"
                )
            if has_documents(entry.dataset) and run.model.question_first:
                raise ValueError(
                    "model.question_first: expected false, since the files of "
                    f"{entry.dataset} give the order, got true"
                )
        self.check_unused(run)
        with errors_under("model"), meta_device():
            self.empty(run)

    def language_model_config(self, section: Any) -> tuple[str, Any]:
        """Return the key and the config of the language model in a ``model`` section."""
        return "model.language_model", section.language_model

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield the names of the logged curves, including one per mixture entry."""
        yield from ("train/loss", "val/loss")
        if len(run.data.mixture) > 1:
            yield from (f"val/loss/{entry.name}" for entry in run.data.mixture)

    def examples(
        self, run: RunSettings, splits: Splits, name: str, parts: Parts
    ) -> DocumentExamples:
        """Return the documents of the data mixture in a split."""
        assert parts.tokenizer is not None
        return DocumentExamples(
            [(entry, splits.open(name, entry.dataset)) for entry in run.data.mixture],
            parts.tokenizer,
            self.document_format(run),
            seed=run.seed,
            scores_questions=run.model.scores_questions,
        )

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> "LanguageTraining":
        """Return the Lightning module that trains the model."""
        from rudolph.training.language import LanguageTraining

        return LanguageTraining(
            model,
            self.reader(run, model),
            run.optim,
            sources=[entry.name for entry in run.data.mixture],
        )

    def open(self, run: RunSettings, model: Any, parts: Parts) -> DocumentCapabilities:
        """Return the capabilities of a trained model."""
        assert parts.tokenizer is not None
        return DocumentCapabilities(
            model,
            self.reader(run, model),
            parts.tokenizer,
            self.document_format(run),
            device=next(model.parameters()).device,
            max_new_tokens=run.model.max_new_tokens,
        )
