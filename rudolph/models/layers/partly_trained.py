"""Models of which training changes only some parts."""

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import nn


class PartlyTrained(nn.Module):
    """A model whose parts, its child modules and own parameters, train together or stay frozen.

    A subclass names the parts of each choice in ``trained_choices``; ``all`` comes first.
    """

    trained_choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    trained = "all"

    def train_only(self, choice: str) -> None:
        """Train the parts of a choice and freeze the others, without dropout.

        Call it before building the optimizer, which takes the parameters that require a gradient.

        Raises:
            ValueError: If the choice is unknown.
        """
        if choice not in self.trained_choices:
            names = ", ".join(self.trained_choices)
            raise ValueError(f"trained must be one of {names}, got {choice!r}")
        self.trained = choice
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] in self.trained_choices[choice])
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the trained parts; frozen parts stay in evaluation mode."""
        super().train(mode)
        for name, module in self.named_children():
            if name not in self.trained_choices[self.trained]:
                module.eval()
        return self
