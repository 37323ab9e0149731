"""The base of families whose run leaves one file of weights and a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rudolph.checkpoints import store
from rudolph.data.seeds import mixed_seed
from rudolph.families.interface import Parts, RunSettings, TrainingFlags
from rudolph.models.weights import load_exactly, read_weights
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.hardware_flags import option_of


class SingleFileFamily:
    """The members of ``families.interface.Family`` that such families share."""

    is_trained = True
    can_shard = False
    reads_images = True
    stage: str

    @property
    def weights_file(self) -> str:
        """Return the file of the weights in ``checkpoints``."""
        return f"{self.stage}.safetensors"

    def needs(self, section: Any) -> tuple[str, ...]:
        """Return the parts that a run trains or loads first."""
        return ("tokenizer",)

    def empty(self, run: RunSettings) -> Any:
        """Construct the model without a seed, as for counting on the meta device."""
        raise NotImplementedError

    def check_unused(self, run: RunSettings) -> None:
        """Check that no setting is set which the family does not use.

        Raises:
            ValueError: If one is; the message names it.
        """
        for key, value in (
            ("tokenizer.bpe_dropout", run.tokenizer.bpe_dropout),
            ("data.unknown_task_probability", run.data.unknown_task_probability),
        ):
            if value:
                raise ValueError(f"{key}: must be 0 for family {self.stage}, got {value:g}")

    def check_flags(self, run: RunSettings, flags: TrainingFlags) -> None:
        """Check that no flag of another family is set.

        Raises:
            ValueError: If one is; the message names it.
        """
        for name in ("activation_checkpointing", "block_masks", "compile"):
            if getattr(flags.hardware, name):
                raise ValueError(f"{option_of(name)}: expected family rudolph, got {self.stage}")

    def build(self, run: RunSettings, parts: Parts) -> Any:
        """Build the model, initialised from the run's seed."""
        torch.manual_seed(mixed_seed(run.seed, self.stage))
        return self.empty(run)

    def adapt(self, source: nn.Module, target: nn.Module) -> list[str]:
        """Copy trained weights into a model of the same shape."""
        load_exactly(target, source.state_dict(), family="model.init")
        return []

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        """Write the tokenizer; return its file and that of the weights."""
        assert parts.tokenizer is not None
        tokenizer = folder / store.TOKENIZER_FILE
        parts.tokenizer.save(tokenizer)
        return [folder / self.weights_file, tokenizer]

    def restore(self, folder: Path, run: RunSettings) -> tuple[Any, Parts]:
        """Load the model and the tokenizer that ``save`` wrote, on the CPU."""
        model, path = self.empty(run), folder / self.weights_file
        load_exactly(model, read_weights(path), family=str(path))
        return model.eval(), Parts(Tokenizer(folder / store.TOKENIZER_FILE))
