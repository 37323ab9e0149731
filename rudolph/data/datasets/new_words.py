"""Few-shot episodes with new words, whose meaning is given only by the preceding shots.

Each image shows one object.  An episode has two *kinds* of object, such as red circles and blue
crosses, and names each kind by a new word.  The meaning of a word changes from episode to episode:

    <image of a red circle> дакс <image of a blue cross> вуг <image of a red circle> -> дакс

The pair is the last image of its episode: its caption is the new word, and its question describes
the object ("красный круг").  A model that reads the questions instead of the images solves the
same task in text.

Without shots, chance accuracy is one over the number of words.  With shots, a model that reads the
words but no image is right half of the time.

Source: Tsimpoukelli 2021 (arXiv:2106.13884), section 3.2, open-ended miniImageNet.
"""

from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from random import Random

from rudolph.data.datasets.shapes_rendering import (
    PALETTE,
    SIGNED_DISTANCES,
    SIZES,
    SceneObject,
    render,
    require_readable_size,
)
from rudolph.data.datasets.shapes_russian import noun_phrase
from rudolph.data.datasets.shapes_scenes import (
    LARGEST_JITTER,
    Cell,
    cells,
    held_out_combinations,
    objects_text,
    sample_shift,
)
from rudolph.data.datasets.synthetic import (
    choose,
    choose_distinct,
    example_rng,
    json_digest,
    num_examples,
    require_choices,
    require_within,
)
from rudolph.data.pairs import Pair, Shot, hash_fraction, require_split
from rudolph.files.constraints import Count, check

# Part of every digest; increment it when the same configuration gives other pairs.
NEW_WORDS_VERSION = 1
GRID_SIDE = 3
# Kinds of object per episode.
NUM_KINDS = 2
# Slice of a kind's 18 placements (size and cell), in shuffled order, that a split shows.
PLACEMENTS = {
    "train": slice(0, 14),
    "validation": slice(14, 16),
    "test": slice(16, 18),
    "compositional": slice(None),
}


@dataclass(frozen=True)
class NewWordsConfig:
    """Configuration of the episodes, and the size of each split.

    Attributes:
        words: The new words, at least two; the compositional split uses the same words.
        max_shots: Number of shots of a training episode.
        shapes: Keys of ``SIGNED_DISTANCES``, at least two.
        colours: Keys of ``PALETTE``, at least two.
        jitter: Largest offset of an object from the centre of its cell per axis, in cells.
        num_train: Number of pairs in the training split.
        num_validation: Number of pairs in the validation split.
        num_test: Number of pairs in the test split and in the compositional split.
        seed: Seed of the pairs; it does not change the split of a pair.
    """

    words: tuple[str, ...] = ("дакс", "вуг", "зил", "тома", "бифо", "лупи", "кенк", "рабо")
    max_shots: Count = 8
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross", "star")
    colours: tuple[str, ...] = tuple(PALETTE)
    jitter: float = 0.04
    num_train: Count = 20_000
    num_validation: Count = 500
    num_test: Count = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        if len(set(self.words)) < max(len(self.words), NUM_KINDS):
            raise ValueError(
                f"words must be at least {NUM_KINDS} different words, got {list(self.words)}"
            )
        require_choices("shapes", self.shapes, legal=SIGNED_DISTANCES, at_least=2)
        require_choices("colours", self.colours, legal=PALETTE, at_least=2)
        require_within("jitter", self.jitter, 0, LARGEST_JITTER)

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """Return the (colour, shape) combinations that only the compositional split has."""
        return held_out_combinations(self.colours, self.shapes)


class NewWords:
    """One split of the episodes; see ``PairDataset`` and ``HasShots``.

    The compositional split shows only kinds in ``NewWordsConfig.held_out``, and no other split
    shows such a kind.  Each of the other splits shows a kind in different sizes and cells (see
    ``placements``).

    Raises:
        ValueError: If a split has fewer than two pairs per kind.
    """

    def __init__(self, config: NewWordsConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        require_readable_size(image_size)
        self.config, self.split, self.image_size = config, split, image_size
        is_compositional = split == "compositional"
        self.kinds = [
            kind
            for kind in product(config.colours, config.shapes)
            if (kind in config.held_out) == is_compositional
        ]
        if len(self) < 2 * len(self.kinds):
            raise ValueError(
                f"new_words: expected at least {2 * len(self.kinds)} pairs in {split}, two of "
                f"each kind, got {len(self)}"
            )
        content = [PALETTE, SIZES, asdict(config), split, image_size]
        self.digest = json_digest("new_words", NEW_WORDS_VERSION, *content)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        scene_object = self._object(index)
        return Pair(
            key=f"new_words/{self.split}/{index:06d}",
            caption=self._episode(index)[1][0],
            image=render([scene_object], grid=GRID_SIDE, image_size=self.image_size),
            attributes={"objects": objects_text([scene_object])},
            question=noun_phrase(scene_object.colour, scene_object.shape),
            choices=self.config.words,
        )

    @property
    def max_shots(self) -> int:
        """Return the number of shots of a training episode."""
        return self.config.max_shots

    def shots(self, index: int, number: int) -> list[Shot]:
        """Return the first ``number`` shots of the episode of a pair.

        Each shot shows one of the episode's kinds at random.  A shot of the pair's own kind never
        has both the size and the cell of the pair's object.
        """
        kinds, words, rng = self._episode(index)
        own = self._object(index)
        shots: list[Shot] = []
        for _ in range(number):
            which = choose(rng, range(NUM_KINDS))
            # Every len(kinds)-th pair is of the same kind.
            same_kind = range(kinds[which], len(self), len(self.kinds))
            shown = choose(rng, same_kind)
            while replace(self._object(shown), shift=own.shift) == own:
                shown = choose(rng, same_kind)
            shots.append(Shot(shown, words[which]))
        return shots

    def chance(self, number: int) -> float:
        """Return the accuracy of a model that reads the words of the shots but no image."""
        return 1 / (len(self.config.words) if number == 0 else NUM_KINDS)

    def _episode(self, index: int) -> tuple[list[int], list[str], Random]:
        """Return the kinds, their words and the random generator of the shots.

        The pair's own kind is first.
        """
        rng = Random(f"{self.config.seed}/{self.split}/{index}/episode")
        own = index % len(self.kinds)
        others = [kind for kind in range(len(self.kinds)) if kind != own]
        words = choose_distinct(rng, self.config.words, number=NUM_KINDS)
        return [own, *choose_distinct(rng, others, number=NUM_KINDS - 1)], words, rng

    def _object(self, index: int) -> SceneObject:
        """Return the object of the pair at ``index``."""
        rng = example_rng(index, seed=self.config.seed, split=self.split, length=len(self))
        number, kind = divmod(index, len(self.kinds))
        colour, shape = self.kinds[kind]
        # Take placements in turn, so that successive pairs of a kind differ in size or cell.
        legal = placements(colour, shape, self.split)
        size, cell = legal[number % len(legal)]
        return SceneObject(shape, colour, size, *cell, shift=sample_shift(self.config.jitter, rng))


@cache
def placements(colour: str, shape: str, split: str) -> tuple[tuple[str, Cell], ...]:
    """Return the (size, cell) placements in which a split shows a kind.

    The training split shows 14 of the 18 placements, and validation and test show 2 others each.
    The compositional split shows all.
    """
    ordered = sorted(
        product(SIZES, cells(GRID_SIDE)),
        key=lambda item: hash_fraction(f"{colour} {shape} {item}"),
    )
    return tuple(ordered[PLACEMENTS[split]])
