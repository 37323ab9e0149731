"""Random texts for fuzz tests, and their number of cases, which ``FUZZ_CASES`` overrides."""

import os
import random

# Letters of prompts, decomposed forms, other scripts, emoji, and characters that break programs.
ALPHABETS = (
    "абвгдежзийклмнопрстуфхцчшщъыьэюяё ",
    "и\u0306е\u0308a\u030a ",
    "a red cat $\\{}%_^&<>'\" ",
    "שלום مرحبا \u202e\u202d\u2067\u200f",
    "🙂👩\u200d🚒\U0001f3fb\ufe0f🇷🇺",
    "\x00\x01\x07\x0b\x0c\x1b\x1c\x85\u2028\u2029\ufeff\ufffe\uffff\t\n\r",
    "\ud800\udbff\udc00\udfff\udcff",
    "\u2581\u00a0\u00ad\u0301\u0323\u0fff\U0010ffff",
)


def num_cases(default: int) -> int:
    """Return the number of random cases of a fuzz test."""
    return int(os.environ.get("FUZZ_CASES", default))


def random_text(rng: random.Random, *, longest: int) -> str:
    """Return a text of at most ``longest`` characters from one or several alphabets."""
    length = rng.randint(0, longest)
    alphabets = rng.sample(ALPHABETS, rng.randint(1, 3))
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(length))
