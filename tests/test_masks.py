"""Every mask: causal, equal to a dense oracle, and equal to the reference bit for bit."""

import pytest
import torch

from rudolph.sequence.layout import SequenceLayout
from rudolph.sequence.masks import (
    MASKS,
    density,
    draw_mask,
    layer_masks,
    mask_row,
    mask_table,
    parse_mask,
    right_without_left,
)

NAMES = ["causal", "row", "row_block", "column", "conv(1)", "conv(3)", "conv(5)", "conv_torus(3)"]
LAYOUTS = [
    SequenceLayout(1, 2, 0),
    SequenceLayout(3, 4, 2),
    SequenceLayout(5, 3, 7),
    SequenceLayout(2, 0, 3),
    SequenceLayout(4, 5, 1),
]


def oracle(name: str, layout: SequenceLayout) -> torch.Tensor:
    """Compute a mask position by position, following its docstring."""
    side, start, end = layout.image_tokens_per_dim, layout.image_start, layout.right_text_start
    table = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    kind, _, kernel = name.rstrip(")").partition("(")
    for query in range(layout.length):
        for key in range(query + 1):
            if not (start <= query < end and start <= key < end):
                table[query, key] = True
                continue
            (row, column), (above, beside) = divmod(query - start, side), divmod(key - start, side)
            down, right = row - above, column - beside
            reach = int(kernel or 0) // 2
            table[query, key] = {
                "causal": True,
                "row": query - key <= side,
                "row_block": down == 0,
                "column": right == 0,
                "conv": abs(down) <= reach and abs(right) <= reach,
                "conv_torus": min(down % side, -down % side) <= reach
                and min(right % side, -right % side) <= reach,
            }[kind]
    return table


def test_every_mask_of_the_table_is_tested_here() -> None:
    assert {name.partition("(")[0] for name in NAMES} == set(MASKS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_table_row_image_and_density_are_the_oracle(name: str, layout: SequenceLayout) -> None:
    rule, expected = parse_mask(name), oracle(name, layout)
    assert torch.equal(mask_table(rule, layout), expected)
    for position in range(layout.length):
        assert torch.equal(mask_row(rule, layout, position), expected[position, : position + 1])
    drawn = [[mark == "#" for mark in line] for line in draw_mask(rule, layout).splitlines()]
    assert torch.equal(torch.tensor(drawn), expected)
    assert density(rule, layout) == pytest.approx(expected.float().mean().item())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_right_text_can_be_kept_from_left_text_and_from_nothing_else(
    name: str, layout: SequenceLayout
) -> None:
    whole, hidden = oracle(name, layout), mask_table(right_without_left(parse_mask(name)), layout)
    start, end = layout.image_start, layout.right_text_start
    assert not hidden[end:, :start].any()
    whole[end:, :start] = False
    assert torch.equal(hidden, whole)


@pytest.mark.parametrize(
    "case", ["rudolph_350m_like", "rudolph_v1_no_specials", "rudalle_v2", "rudalle_v3"]
)
def test_masks_equal_the_reference_bit_for_bit(parity, case: str) -> None:
    golden = parity(case)
    config = golden.config
    left = config.get("l_text_seq_length", config.get("text_seq_length"))
    layout = SequenceLayout(
        left, config["image_tokens_per_dim"], config.get("r_text_seq_length", 0)
    )
    # ruDALL-E has only kernel size 11; its v2 wraps around the borders.
    conv = "conv_torus(11)" if case == "rudalle_v2" else f"conv({config.get('kernel_size', 11)})"
    names = {"row": "row", "col": "column", "conv": conv}
    names["last_conv"] = f"conv({config.get('last_kernel_size')})"
    stored = {key: mask for key, mask in golden.io.items() if key.startswith("mask_")}
    assert len(stored) >= 3
    for key, mask in stored.items():
        name = names[key.removeprefix("mask_").removesuffix("_mask")]
        assert torch.equal(mask_table(parse_mask(name), layout), mask.bool()), key


@pytest.mark.parametrize("depth", range(1, 33))
def test_layers_have_ru_dolphs_order_at_any_depth(depth: int) -> None:
    expected = []
    for i in range(depth):  # rudolph/model/transformer.py, lines 100 to 109
        if (i - 1) % 4 == 0:
            expected.append("column")
        elif i == depth - 1:
            expected.append("conv(9)")
        elif (i - 3) % 4 == 0:
            expected.append("conv(7)")
        else:
            expected.append("row")
    assert layer_masks(["row", "column", "row", "conv(7)"], "conv(9)", depth) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows", "must be one of causal, row"),
        ("conv", r"conv\(7\)"),
        ("conv(4)", "odd"),
        ("row(3)", "expected no kernel size"),
        ("", "must be one of"),
        ("conv(-1)", "must be one of"),
    ],
)
def test_a_wrong_mask_name_is_told_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_mask(text)
    assert "\n" not in str(caught.value)
