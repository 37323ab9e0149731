"""Models whose parts can be trained or frozen."""

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import nn


class PartlyTrained(nn.Module):
    """A model that trains some of its parts and freezes the others.

    A part is a child module or a parameter of the model itself.  ``trained_choices`` of a subclass
    maps each choice to the parts that it trains; ``all`` comes first.
    """

    trained_choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    trained = "all"

    def train_only(self, choice: str) -> None:
        """Train the parts of a choice; freeze the others and turn off their dropout.

        Call this method before building the optimizer, which takes only the parameters that
        require a gradient.

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
