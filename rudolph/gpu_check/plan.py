"""Which parts the check has, in which order, and how long each may take.

This module imports nothing heavy: the process that supervises the check needs no torch.

To add a part, name it here and in ``worker.PARTS``.
"""

from dataclasses import dataclass

CHECKS, SPEED = "checks.csv", "speed.csv"


@dataclass(frozen=True)
class Part:
    """The table that a part writes to, and its time budget in seconds."""

    table: str
    seconds: float


# The most valuable first: what does not fit into the whole budget is left out at the end.
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
