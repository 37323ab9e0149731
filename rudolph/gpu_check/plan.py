"""The parts of the check, in order, with their time budgets.

This module imports nothing heavy, because the process that supervises the check needs no torch.

To add a part, name it here and in ``parts.CHECK_PARTS``.
"""

from dataclasses import dataclass

CHECKS, SPEED = "checks.csv", "speed.csv"


@dataclass(frozen=True)
class Part:
    """A part's output table and its time budget in seconds."""

    table: str
    seconds: float


# The most valuable parts come first: the last ones are dropped when the total time runs out.
PLAN = {
    "limits": Part(SPEED, 20),
    "golden": Part(CHECKS, 30),
    "decoding_steps": Part(CHECKS, 30),
    "precision": Part(CHECKS, 20),
    "masks": Part(CHECKS, 60),
    "resume": Part(CHECKS, 40),
    "train_350m": Part(SPEED, 75),
    "decode_350m": Part(SPEED, 75),
    "compile": Part(CHECKS, 60),
    "images": Part(SPEED, 45),
    "quickstart": Part(SPEED, 150),
    "train_1.3b": Part(SPEED, 75),
    "decode_1.3b": Part(SPEED, 75),
    "adam8bit": Part(CHECKS, 15),
}
