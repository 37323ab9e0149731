"""Sums, differences and products in words, without an image, with or without answer options.

======  =============================================  =======
form    a question                                     answer
======  =============================================  =======
open    сколько будет 7 + 5?                           12
choice  сколько будет 7 + 5? а) 11 б) 12 в) 17         б
======  =============================================  =======

The right option is in every place equally often, and as often the least as the greatest, so far as
no option is below 0.

Splits: the hash of an expression says whether it is of train, validation or test, in either form;
7 + 5 and 5 + 7 are one expression. *Compositional* are the expressions with a number that its
operation has in no other split, while the other operations have it everywhere.

To add an operation, write its row in ``OPERATIONS``.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import NamedTuple

from rudolph.data.datasets.synthetic import (
    choose,
    choose_distinct,
    choose_number,
    example_rng,
    json_digest,
    num_examples,
    require_choices,
    require_sizes,
    require_within,
    sample_until,
    split_by_hash,
)
from rudolph.data.pairs import Pair, require_split

# Counted up whenever the same configuration would give other pairs than before.
ARITHMETIC_VERSION = 1

LETTERS = ("а", "б", "в", "г", "д")
# How far a wrong option is from the one beside it: mistakes by one, and in one digit.
_STEPS = (1, 1, 2, 3, 5, 10)


class Operation(NamedTuple):
    """``is_symmetric``: both orders of the operands give the same."""

    compute: Callable[[int, int], int]
    is_symmetric: bool


OPERATIONS = {
    "+": Operation(lambda first, second: first + second, is_symmetric=True),
    "-": Operation(lambda first, second: first - second, is_symmetric=False),
    "×": Operation(lambda first, second: first * second, is_symmetric=True),
}


@dataclass(frozen=True)
class ArithmeticConfig:
    """Which expressions there are, and how they are asked.

    Args:
        max_number: the greatest number of a sum, and the one that a difference takes away from.
            No difference is below 0.
        max_factor: the greatest number of a product.
        choice_fraction: the share of pairs with options.
        num_choices: how many options, 2 to 5.
        num_test: pairs of the test split, and as many of the compositional one.
        seed: another seed draws other pairs, and leaves every expression in its split.
    """

    operations: tuple[str, ...] = ("+", "-", "×")
    max_number: int = 50
    max_factor: int = 9
    choice_fraction: float = 0.5
    num_choices: int = 3
    num_train: int = 20_000
    num_validation: int = 500
    num_test: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        require_choices("operations", self.operations, legal=OPERATIONS, at_least=1)
        require_within("max_factor", self.max_factor, 5, 99)
        require_within("max_number", self.max_number, self.max_factor, 9999)
        require_within("choice_fraction", self.choice_fraction, 0, 1)
        require_within("num_choices", self.num_choices, 2, len(LETTERS))
        require_sizes(self)

    @property
    def held_out(self) -> dict[str, int]:
        """The number that an operation has in the compositional split alone, another for each.

        With one operation there is none: no other would show the number.
        """
        if len(self.operations) == 1:
            return {}
        return {
            operation: self.max_factor - 1 - place
            for place, operation in enumerate(self.operations)
        }


class Expression(NamedTuple):
    """Two numbers and what is done with them."""

    first: int
    operation: str
    second: int

    def __str__(self) -> str:
        return f"{self.first} {self.operation} {self.second}"

    @property
    def value(self) -> int:
        return OPERATIONS[self.operation].compute(self.first, self.second)


class Arithmetic:
    """One split of the expressions; see ``PairDataset``. There is no image: of what size it
    would be changes nothing.

    ``attributes`` of a pair are ``family``, the operation; ``form``; ``expression`` and ``value``.

    Raises:
        ValueError: the compositional split is asked for with one operation.
    """

    def __init__(self, config: ArithmeticConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        if split == "compositional" and not config.held_out:
            raise ValueError(
                "operations must be at least 2 for the compositional split, "
                f"got {config.operations}"
            )
        self.config = config
        self.split = split
        self.digest = json_digest("arithmetic", ARITHMETIC_VERSION, asdict(config), split)

    def __len__(self) -> int:
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        config = self.config
        rng = example_rng(index, seed=config.seed, split=self.split, length=len(self))
        operation = choose(rng, config.operations)
        expression = sample_until(
            lambda: sample_expression(operation, config, rng),
            lambda drawn: split_of_expression(drawn, config) == self.split,
            otherwise=f"max_number and max_factor leave no {operation} for {self.split}: "
            "raise them",
        )
        question, answer = f"сколько будет {expression}?", str(expression.value)
        choices: tuple[str, ...] = ()
        form = "choice" if rng.random() < config.choice_fraction else "open"
        if form == "choice":
            options = sample_options(expression.value, config.num_choices, rng)
            choices = LETTERS[: len(options)]
            answer = choices[options.index(expression.value)]
            listed = zip(choices, options, strict=True)
            question = " ".join([question, *(f"{letter}) {option}" for letter, option in listed)])
        return Pair(
            key=f"arithmetic/{self.split}/{index:06d}",
            caption=answer,
            image=None,
            attributes={
                "family": operation,
                "form": form,
                "expression": str(expression),
                "value": str(expression.value),
            },
            question=question,
            choices=choices,
        )


def sample_expression(operation: str, config: ArithmeticConfig, rng: Random) -> Expression:
    """Any two numbers within the bounds; a difference takes the smaller from the greater."""
    most = config.max_factor if operation == "×" else config.max_number
    numbers = [choose_number(rng, 0, most) for _ in range(2)]
    first, second = sorted(numbers, reverse=True) if operation == "-" else numbers
    return Expression(first, operation, second)


def sample_options(value: int, number: int, rng: Random) -> list[int]:
    """Different options of which one is right, none of them below 0, in an order that is drawn."""
    # The place of the right one among them by size comes first, or the middle would be a hint.
    num_below = min(choose_number(rng, 0, number - 1), value)
    options = [value]
    for place in range(1, number):
        step = choose(rng, _STEPS)
        if place <= num_below:
            # So much that the ones still to come find room above 0.
            options.append(min(options) - min(step, min(options) - (num_below - place)))
        else:
            options.append(max(options) + step)
    return choose_distinct(rng, options, number=number)


def split_of_expression(expression: Expression, config: ArithmeticConfig) -> str:
    """The one split that an expression can be of."""
    numbers = [expression.first, expression.second]
    if config.held_out.get(expression.operation) in numbers:
        return "compositional"
    if OPERATIONS[expression.operation].is_symmetric:
        numbers.sort()
    return split_by_hash(f"{numbers[0]} {expression.operation} {numbers[1]}")
