"""All true sentences of a scene, compared with the checker that reads images."""

import pytest

from rudolph.data.datasets.shapes import Shapes, ShapesConfig, is_sentence
from rudolph.data.datasets.shapes_checker import Reading, ReadObject, check_scene


@pytest.mark.parametrize("grid", [2, 3])
def test_a_sentence_is_true_where_the_judge_says_so_of_the_scene(grid: int) -> None:
    config = ShapesConfig(
        grid=grid, shapes=("circle", "star"), colours=("red", "blue"), max_count=3
    )
    world = Shapes(config, split="train", image_size=24)
    scenes = [world.scene(index) for index in range(60)]
    for place in range(len(scenes)):
        objects = scenes[place].objects
        found = [(o.shape, o.colour, o.size, o.row, o.column) for o in objects]
        reading = Reading(tuple(ReadObject(*each, 1.0) for each in found), 1.0)
        told = world.sentences(place)
        assert scenes[place].sentence in told and len(set(told)) == len(told)
        assert all(is_sentence(each, config) for each in told)
        # Exactly those sentences of other scenes that are true of this scene count as correct.
        right = {other.sentence for other in scenes if check_scene(other, reading).is_correct}
        assert right == {other.sentence for other in scenes} & set(told)
