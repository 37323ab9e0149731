"""Sums, differences and products as questions, without images, with or without answer options.

======  =============================================  =======
form    example question                               answer
======  =============================================  =======
open    сколько будет 7 + 5?                           12
choice  сколько будет 7 + 5? а) 11 б) 12 в) 17         б
======  =============================================  =======

The correct option is equally often at each position.  It is the smallest as often as the largest,
except where smaller options would be negative.

Splits: the hash of an expression decides between train, validation and test, for both forms; 7 + 5
and 5 + 7 are one expression.  Each operation holds out one number: it uses this number only in the
*compositional* split.  The other operations use the number in every split.

To add an operation, add it to ``OPERATIONS``.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, NamedTuple

from rudolph.data.datasets.synthetic import (
    choose,
    choose_distinct,
    choose_number,
    example_rng,
    json_digest,
    num_examples,
    require_choices,
    require_within,
    sample_until,
    split_by_hash,
)
from rudolph.data.pairs import Pair, require_split
from rudolph.files.constraints import Bounds, Count, Fraction, check

# Part of every digest; increment it when the same configuration gives other pairs.
ARITHMETIC_VERSION = 1

LETTERS = ("а", "б", "в", "г", "д")
# Distances between neighbouring options; they imitate off-by-one errors and errors in one digit.
_STEPS = (1, 1, 2, 3, 5, 10)


class Operation(NamedTuple):
    """An operation on two numbers, symmetric if the order of the operands does not matter."""

    compute: Callable[[int, int], int]
    is_symmetric: bool


OPERATIONS = {
    "+": Operation(lambda first, second: first + second, is_symmetric=True),
    "-": Operation(lambda first, second: first - second, is_symmetric=False),
    "×": Operation(lambda first, second: first * second, is_symmetric=True),
}


@dataclass(frozen=True)
class ArithmeticConfig:
    """Configuration of the expressions and the form of their questions.

    Attributes:
        operations: Keys of ``OPERATIONS``.
        max_number: Largest operand of a sum or a difference; no difference is negative.
        max_factor: Largest factor of a product.
        choice_fraction: Fraction of pairs with answer options.
        num_choices: Number of options, 2 to 5.
        num_train: Number of pairs in the training split.
        num_validation: Number of pairs in the validation split.
        num_test: Number of pairs in the test split and in the compositional split.
        seed: Seed of the pairs; it does not change the split of an expression.
    """

    operations: tuple[str, ...] = ("+", "-", "×")
    max_number: int = 50
    max_factor: Annotated[int, Bounds(ge=5, le=99)] = 9
    choice_fraction: Fraction = 0.5
    num_choices: int = 3
    num_train: Count = 20_000
    num_validation: Count = 500
    num_test: Count = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        require_choices("operations", self.operations, legal=OPERATIONS, at_least=1)
        require_within("max_number", self.max_number, self.max_factor, 9999)
        require_within("num_choices", self.num_choices, 2, len(LETTERS))

    @property
    def held_out(self) -> dict[str, int]:
        """Return the number that each operation uses in the compositional split only.

        Each operation holds out a different number.  The dictionary is empty for a single
        operation, because no other operation would show the number in training.
        """
        if len(self.operations) == 1:
            return {}
        return {
            operation: self.max_factor - 1 - index
            for index, operation in enumerate(self.operations)
        }


class Expression(NamedTuple):
    """Two operands and the operation between them."""

    first: int
    operation: str
    second: int

    def __str__(self) -> str:
        """Return the expression as it is written in a question."""
        return f"{self.first} {self.operation} {self.second}"

    @property
    def value(self) -> int:
        """Return the value of the expression."""
        return OPERATIONS[self.operation].compute(self.first, self.second)


class Arithmetic:
    """One split of the arithmetic questions; see ``PairDataset``.

    There are no images, so ``image_size`` has no effect.  The ``attributes`` of a pair are
    ``family`` (the operation), ``form``, ``expression`` and ``value``.

    Raises:
        ValueError: If the split is compositional and there is only one operation.
    """

    def __init__(self, config: ArithmeticConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        if split == "compositional" and not config.held_out:
            raise ValueError(
                "operations: expected at least 2 for the compositional split, "
                f"got {config.operations}"
            )
        self.config = config
        self.split = split
        self.digest = json_digest("arithmetic", ARITHMETIC_VERSION, asdict(config), split)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        config = self.config
        rng = example_rng(index, seed=config.seed, split=self.split, length=len(self))
        operation = choose(rng, config.operations)
        expression = sample_until(
            lambda: sample_expression(operation, config, rng),
            lambda candidate: split_of_expression(candidate, config) == self.split,
            error_message="max_number and max_factor: no expression with "
            f"{operation} falls into {self.split}. Raise them",
        )
        question, answer = f"сколько будет {expression}?", str(expression.value)
        choices: tuple[str, ...] = ()
        form = "choice" if rng.random() < config.choice_fraction else "open"
        if form == "choice":
            options = sample_options(expression.value, config.num_choices, rng)
            choices = LETTERS[: len(options)]
            answer = choices[options.index(expression.value)]
            lettered = zip(choices, options, strict=True)
            question = " ".join(
                [question, *(f"{letter}) {option}" for letter, option in lettered)]
            )
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
    """Sample two numbers within the bounds; a difference subtracts the smaller from the larger."""
    max_operand = config.max_factor if operation == "×" else config.max_number
    numbers = [choose_number(rng, 0, max_operand) for _ in range(2)]
    first, second = sorted(numbers, reverse=True) if operation == "-" else numbers
    return Expression(first, operation, second)


def sample_options(value: int, number: int, rng: Random) -> list[int]:
    """Sample ``number`` distinct non-negative options, one of them ``value``, in random order."""
    # Sample the rank of the correct option first; otherwise it would tend to be in the middle.
    num_below = min(choose_number(rng, 0, number - 1), value)
    options = [value]
    for rank in range(1, number):
        step = choose(rng, _STEPS)
        if rank <= num_below:
            # Leave room for the smaller options that follow, which must not be negative.
            options.append(min(options) - min(step, min(options) - (num_below - rank)))
        else:
            options.append(max(options) + step)
    return choose_distinct(rng, options, number=number)


def split_of_expression(expression: Expression, config: ArithmeticConfig) -> str:
    """Return the only split to which an expression can belong."""
    numbers = [expression.first, expression.second]
    if config.held_out.get(expression.operation) in numbers:
        return "compositional"
    if OPERATIONS[expression.operation].is_symmetric:
        numbers.sort()
    return split_by_hash(f"{numbers[0]} {expression.operation} {numbers[1]}")
