"""Random texts and the number of cases of fuzz tests, which ``FUZZ_CASES`` raises."""

import os
import random

# Letters of prompts, their decomposed forms, scripts, emoji, and what breaks programs.
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
    """Return how many random cases a fuzz test tries."""
    return int(os.environ.get("FUZZ_CASES", default))


def random_text(rng: random.Random, *, longest: int) -> str:
    """Return a text of up to ``longest`` characters of one or several alphabets."""
    length = rng.randint(0, longest)
    alphabets = rng.sample(ALPHABETS, rng.randint(1, 3))
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(length))
