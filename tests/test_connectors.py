"""Connectors: one interface, counts known before, and padding that never matters."""

import math

import pytest
import torch
from torch import nn

from rudolph.models.fusion.connectors import (
    CONNECTORS,
    ConnectorConfig,
    ConnectorShape,
    build_connector,
    merge_tokens,
    to_cells,
)

WIDTH_IN, WIDTH_OUT, GRID = 6, 10, (4, 6)
SHAPE = ConnectorShape(WIDTH_IN, WIDTH_OUT, GRID)
NUM_IN = 24
SQUARES = {"abstractor": 9, "tome": 7, "resampler": 5}


def config_of(kind: str, **changes) -> ConnectorConfig:
    sizes = {"num_out": SQUARES.get(kind, 1), "width": 8, "depth": 1} | changes
    return ConnectorConfig(kind, **sizes)


def connector(kind: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return build_connector(config_of(kind, **changes), SHAPE)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Features with padding in the middle and at the end, two cells of it whole."""
    torch.manual_seed(1)
    mask = torch.ones(2, NUM_IN, dtype=torch.bool)
    mask[0, 9:] = False
    mask[1, [0, 1, 6, 7, 13, 22]] = False
    return torch.randn(2, NUM_IN, WIDTH_IN), mask


# Connectors of features; the others read codes, or nothing.
READERS = [kind for kind in CONNECTORS if kind not in ("table", "blank")]


def test_every_connector_is_tested() -> None:
    assert CONNECTORS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("kind", READERS)
def test_the_number_of_tokens_is_known_before_the_model_runs(kind: str) -> None:
    model = connector(kind)
    values, mask = model(torch.randn(3, NUM_IN, WIDTH_IN))
    assert values.shape == (3, model.num_tokens, WIDTH_OUT)
    assert mask is None
    assert model.grid_out is None or math.prod(model.grid_out) == model.num_tokens
    whole = model(padded()[0], torch.ones(2, NUM_IN, dtype=torch.bool))
    assert whole.mask.shape == (2, model.num_tokens)
    assert whole.mask.all()
    torch.testing.assert_close(whole.values, model(padded()[0]).values)


@pytest.mark.parametrize("kind", READERS)
def test_what_padding_holds_changes_no_real_token(kind: str) -> None:
    model, (features, mask) = connector(kind), padded()
    found = model(features, mask)
    other = torch.where(mask[..., None], features, torch.full_like(features, 1e3))
    again = model(other, mask)
    assert torch.equal(found.mask, again.mask)
    assert torch.equal(found.values[found.mask], again.values[found.mask])
    assert found.mask.any(1).all()
    assert not torch.equal(model(other).values, model(features).values)


@pytest.mark.parametrize("kind", READERS)
def test_a_batch_gives_what_its_images_give_alone(kind: str) -> None:
    model, (features, mask) = connector(kind), padded()
    together = model(features, mask)
    for index in range(2):
        alone = model(features[index : index + 1], mask[index : index + 1])
        assert torch.equal(alone.mask[0], together.mask[index])
        torch.testing.assert_close(alone.values[0], together.values[index])


@pytest.mark.parametrize("kind", READERS)
def test_a_gradient_reaches_parameters_and_real_features_alone(kind: str) -> None:
    model, (features, mask) = connector(kind), padded()
    features.requires_grad_()
    values, kept = model(features, mask)
    values[kept].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    reached = features.grad.abs().sum(-1) > 0
    assert torch.equal(reached, mask)


def mlp_parameters(width_in: int, width_out: int) -> int:
    return (width_in + width_out + 2) * width_out


PARAMETERS = {
    "linear": lambda config: (WIDTH_IN + 1) * WIDTH_OUT,
    "mlp": lambda config: mlp_parameters(WIDTH_IN, WIDTH_OUT),
    "pool": lambda config: mlp_parameters(WIDTH_IN, WIDTH_OUT),
    "shuffle": lambda config: mlp_parameters(config.factor**2 * WIDTH_IN, WIDTH_OUT),
    "abstractor": lambda config: (
        NUM_IN * WIDTH_IN
        + (WIDTH_IN + 1) * config.width
        + 2 * config.depth * config.width * (9 + 1 + 2 + 8 * config.width + 5 + 1)
        + mlp_parameters(config.width, WIDTH_OUT)
    ),
    "tome": lambda config: mlp_parameters(WIDTH_IN, WIDTH_OUT),
    "table": lambda config: WIDTH_IN * WIDTH_OUT,
    "blank": lambda config: config.num_out * WIDTH_OUT,
    "resampler": lambda config: (
        config.num_out * WIDTH_IN
        + config.depth * (4 * WIDTH_IN + 4 * WIDTH_IN**2 + 2 * WIDTH_IN + 8 * WIDTH_IN**2)
        + 2 * WIDTH_IN
        + (WIDTH_IN + 1) * WIDTH_OUT
    ),
}


@pytest.mark.parametrize("kind", CONNECTORS)
def test_parameters_are_those_of_the_formula(kind: str) -> None:
    count = sum(parameter.numel() for parameter in connector(kind, depth=2).parameters())
    assert count == PARAMETERS[kind](config_of(kind, depth=2))


def test_a_table_embeds_codes_and_a_blank_ignores_the_image() -> None:
    table, blank = connector("table"), connector("blank", num_out=3)
    codes = torch.arange(NUM_IN)[None] % WIDTH_IN
    assert torch.equal(table(codes).values[0, 7], table.embedding.weight[1])
    features = padded()[0]
    values = blank(features).values
    assert values.shape == (2, blank.num_tokens, WIDTH_OUT) and blank.num_tokens == 3
    assert torch.equal(values, blank(1 - features).values)
    with pytest.raises(ValueError, match="expected 24 tokens per image, got 23"):
        table(codes[:, 1:])


@pytest.mark.parametrize(("width", "count"), [(4096, 20_979_712), (5120, 31_467_520)])
def test_llavas_connectors_have_their_parameter_counts(width: int, count: int) -> None:
    with torch.device("meta"):
        model = build_connector(ConnectorConfig(), ConnectorShape(1024, width, (24, 24)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("factor", [1, 2])
def test_pixel_shuffle_inverts_and_is_torchs_pixel_unshuffle(factor: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, NUM_IN, 3)
    cells = to_cells(x, GRID, factor)  # (B, M, factor^2, C)
    rows, columns = (side // factor for side in GRID)
    back = cells.view(2, rows, columns, factor, factor, 3).permute(0, 1, 3, 2, 4, 5)
    assert torch.equal(back.reshape(2, NUM_IN, 3), x)
    maps = x.mT.reshape(2, 3, *GRID)
    unshuffled = nn.functional.pixel_unshuffle(maps, factor)  # channels before cells
    assert torch.equal(unshuffled.unflatten(1, (3, -1)).flatten(3).permute(0, 3, 2, 1), cells)


def test_average_pooling_is_torchs_over_a_grid_without_padding() -> None:
    model = connector("pool")
    model.project = nn.Identity()
    features = torch.randn(2, NUM_IN, WIDTH_IN)
    maps = features.mT.reshape(2, WIDTH_IN, *GRID)
    expected = nn.functional.avg_pool2d(maps, 2).flatten(2).mT
    torch.testing.assert_close(model(features).values, expected)


def test_a_cell_is_the_mean_of_its_real_tokens() -> None:
    model, (features, mask) = connector("pool"), padded()
    model.project = nn.Identity()
    values, kept = model(features, mask)
    cells, are_real = (to_cells(x, GRID, 2) for x in (features, mask[..., None]))
    for row in range(2):
        for cell in range(6):
            real = cells[row, cell][are_real[row, cell].squeeze(-1)]
            assert kept[row, cell] == (len(real) > 0)
            if len(real):
                torch.testing.assert_close(values[row, cell], real.mean(0))


def test_an_abstractor_reads_a_padded_grid_as_the_grid_without_its_padding() -> None:
    whole = connector("abstractor", num_out=1, depth=2)
    narrow = build_connector(
        config_of("abstractor", num_out=1, depth=2), SHAPE._replace(grid=(4, 4))
    )
    is_kept = torch.zeros(4, 6, dtype=torch.bool)
    is_kept[:, :4] = True
    state = whole.state_dict()
    narrow.load_state_dict(state | {"positions": state["positions"][is_kept.flatten()]})
    for blocks in (whole, narrow):
        for block in (*blocks.before, *blocks.after):
            nn.init.ones_(block.scale)  # else a block is the identity to six digits
    features = torch.randn(2, NUM_IN, WIDTH_IN)
    found, kept = whole(features, is_kept.flatten().expand(2, -1))
    assert kept.all()
    torch.testing.assert_close(found, narrow(features[:, is_kept.flatten()]).values)


def test_a_real_token_joins_a_real_one_however_unlike() -> None:
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.1], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, True, False]])
    merged = merge_tokens(x, 2, mask)
    assert merged.groups.tolist() == [[0, 0, 0, 1]]
    assert merged.sizes.tolist() == [[3, 0]]


def test_merging_nothing_is_the_identity() -> None:
    x = torch.randn(2, 7, 3)
    merged = merge_tokens(x, 7)
    assert torch.equal(merged.values, x)
    assert (merged.sizes == 1).all()
    assert torch.equal(merged.groups, torch.arange(7).expand(2, -1))


@pytest.mark.parametrize("num_out", [1, 2, 5, 6])
@pytest.mark.parametrize("is_padded", [False, True])
def test_merged_then_unmerged_tokens_keep_their_sums(num_out: int, is_padded: bool) -> None:
    torch.manual_seed(num_out)
    x = torch.randn(3, 11, 4)
    mask = torch.rand(3, 11) < (0.6 if is_padded else 2)
    values, sizes, groups = merge_tokens(x, num_out, mask)
    weights = mask[..., None].to(x.dtype)
    unmerged = values.gather(1, groups[..., None].expand(-1, -1, 4)) * weights
    torch.testing.assert_close(unmerged.sum(1), (x * weights).sum(1))
    assert torch.equal(sizes.sum(1), mask.sum(1).float())
    for row in range(3):
        for group in range(num_out):
            members = x[row][mask[row] & (groups[row] == group)]
            assert len(members) == sizes[row, group]
            if len(members):
                torch.testing.assert_close(values[row, group], members.mean(0))


def test_the_most_similar_pair_merges_and_the_order_of_the_image_stays() -> None:
    x = torch.eye(6)[None].clone()
    x[0, 4] = x[0, 1] + 0.1 * x[0, 4]  # the fifth token resembles the second
    merged = merge_tokens(x, 5)
    assert merged.groups.tolist() == [[0, 1, 2, 3, 1, 4]]
    assert merged.sizes.tolist() == [[1, 2, 1, 1, 1]]


def test_real_tokens_leave_only_when_no_padding_at_even_places_is_left() -> None:
    mask = torch.tensor([[True, True, False, True, False, True, True, True]])
    merged = merge_tokens(torch.randn(1, 8, 3), 6, mask)
    assert merged.sizes.tolist() == [[1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("qformer", {}, "kind: expected one of linear, mlp"),
        ("pool", {"factor": 4}, "factor: expected a divisor of the grid 4x6, got 4"),
        ("shuffle", {"factor": 0}, "factor: expected at least 1, got 0"),
        ("abstractor", {"num_out": 8}, "num_out: expected a square for abstractor, got 8"),
        ("tome", {"num_out": 25}, "num_out: expected at most the 24 tokens"),
    ],
)
def test_a_config_that_cannot_work_is_named(kind: str, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        connector(kind, **changes)


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "tome"])
def test_another_number_of_tokens_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match="expected 24 tokens per image, got 23"):
        connector(kind)(torch.zeros(1, 23, WIDTH_IN))
    with pytest.raises(ValueError, match="expected at least 7 tokens per image, got 6"):
        connector("tome")(torch.zeros(1, 6, WIDTH_IN))
