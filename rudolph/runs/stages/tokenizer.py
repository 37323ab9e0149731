"""The data of a run and its text tokenizer, loaded, cached or trained."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rudolph.config.run import digest_of
from rudolph.data.splits import DocumentSplit, Split, Splits, has_documents
from rudolph.files.atomic import rename_damaged, warn_once
from rudolph.runs.execution import Execution
from rudolph.runs.resolve import find_tokenizer
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.tracking.tracker import tracking_uri


def open_data(execution: Execution, splits: Splits, *, has_tokenizer: bool) -> Tokenizer | None:
    """Open the training and validation splits and return the tokenizer of their texts.

    Args:
        execution: The run.
        splits: Splits of the run's datasets.
        has_tokenizer: Whether the run needs a tokenizer; if not, return None.
    """
    datasets = splits.config.datasets
    with execution.stage("data") as advance:
        numbers = Counter[str]()
        for done, dataset in enumerate(datasets):
            advance(done, len(datasets), dataset)
            unit = "documents" if has_documents(dataset) else "pairs"
            numbers[unit] += len(splits.open("train", dataset))
            splits.open("validation", dataset)
        tokenizer, note = None, ", ".join(f"{count} {unit}" for unit, count in numbers.items())
        if has_tokenizer:
            tokenizer = make_tokenizer(execution, splits.all("train"))
            note += f", {tokenizer.vocab_size} BPE ids"
        report = splits.open("train").report
        if report is not None:
            note += f", {report.num_skipped} bad rows skipped"
        advance(len(datasets), len(datasets), note)
    return tokenizer


def make_tokenizer(execution: Execution, train: Sequence[Split | DocumentSplit]) -> Tokenizer:
    """Return the tokenizer of ``tokenizer.path``, or one trained on all training texts.

    Raises:
        ValueError: If the tokenizer has more ids than ``tokenizer.vocab_size``.
    """
    config, cache = execution.config, execution.folders.cache
    size = config.tokenizer.vocab_size
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer(find_tokenizer(config.tokenizer.path, **source_locations(execution)))
        if tokenizer.vocab_size > size:
            raise ValueError(
                f"tokenizer.vocab_size: expected at least {tokenizer.vocab_size}, the ids of "
                f"{config.tokenizer.path}, got {size}"
            )
        return tokenizer
    texts = (text for split in train for text in split.texts())
    # Tokenizers trained on captions only have an older form of digest, which must not change.
    first = train[0]
    has_captions_only = len(train) == 1 and isinstance(first, Split) and not any(first.questions)
    texts_digest = (
        first.digest if has_captions_only else ["texts", *(split.digest for split in train)]
    )
    path = cache / f"tokenizer-{digest_of([size, texts_digest])[:16]}.model"
    if os.path.lexists(path):
        try:
            return Tokenizer(path)
        except (ValueError, OSError) as error:
            renamed = rename_damaged(path)
            warn_once(f"{error}; renamed {renamed.name}; training the tokenizer again")
    return Tokenizer.train(texts, vocab_size=size, path=path)


def source_locations(execution: Execution) -> dict[str, Any]:
    """Return the arguments ``runs`` and ``uri`` that resolve a weight source."""
    folders = execution.folders
    return {"runs": folders.runs, "uri": tracking_uri(folders.checkout)}
