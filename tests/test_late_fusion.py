"""Late fusion: forms that are known in closed form, parameters, and missing modalities."""

import pytest
import torch
from torch import nn

from rudolph.models.fusion.late_fusion import FUSIONS, NEED_ALL, FusionConfig, build_fusion

D = 4
GATED = [("gated", gate, size) for gate in ("sigmoid", "softmax") for size in ("scalar", "vector")]
ALL = [(kind, "sigmoid", "vector") for kind in FUSIONS if kind != "gated"] + GATED
ROBUST = [case for case in ALL if case[0] not in NEED_ALL]


def widths_of(kind: str) -> tuple[int, ...]:
    if kind in ("additive", "product"):
        return (D, D, D)
    return (3, 5) if kind == "bilinear" else (3, D, 5)


def config_of(case: tuple[str, str, str]) -> FusionConfig:
    kind, gate, size = case
    return FusionConfig(kind, widths_of(kind), D, rank=6, hidden=7, gate=gate, gate_size=size)


def fusion(case: tuple[str, str, str]) -> nn.Module:
    torch.manual_seed(0)
    return build_fusion(config_of(case))


def inputs_of(kind: str, *shape: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape, width) for width in widths_of(kind)]


def parameters_of(config: FusionConfig) -> int:
    k, total, d = len(config.widths), sum(config.widths), config.width
    if config.kind == "gated":
        projected = sum((width + 1) * d for width in config.widths if width != d)
        return projected + (total + 1) * k * (d if config.gate_size == "vector" else 1)
    return {
        "additive": k,
        "linear_sum": d * total + d,
        "product": 1,
        "low_rank": config.rank * (total + d),
        "bilinear": config.widths[0] * config.widths[1] * d + d,
        "gmu": (k + 1) * d * total + k * d,
        "concat": (total + 1) * config.hidden + (config.hidden + 1) * d,
    }[config.kind]


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_parameters_are_those_of_the_formula(case) -> None:
    count = sum(parameter.numel() for parameter in fusion(case).parameters())
    assert count == parameters_of(config_of(case))


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_a_gradient_reaches_every_parameter_and_modality(case) -> None:
    model, inputs = fusion(case), [x.requires_grad_() for x in inputs_of(case[0], 3)]
    out = model(inputs)
    assert out.shape == (3, D)
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert all((x.grad.abs().sum(-1) > 0).all() for x in inputs)


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_positions_of_a_sequence_are_fused_each_on_its_own(case) -> None:
    model, inputs = fusion(case), inputs_of(case[0], 2, 3)
    together = model(inputs)
    for row in range(2):
        for position in range(3):
            alone = model([x[row, position][None] for x in inputs])
            torch.testing.assert_close(together[row, position], alone[0])


def test_additive_weights_of_one_and_zero_return_the_first_modality() -> None:
    model, inputs = fusion(("additive", "sigmoid", "vector")), inputs_of("additive", 3)
    torch.testing.assert_close(model(inputs), torch.stack(inputs).mean(0))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(model(inputs), inputs[0])


@pytest.mark.parametrize("case", GATED, ids="-".join)
def test_a_gate_forced_to_one_returns_its_modality(case) -> None:
    config = FusionConfig("gated", (D, D, D), D, gate=case[1], gate_size=case[2])
    inputs = inputs_of("additive", 5)
    for index in range(3):
        model = build_fusion(config)
        nn.init.zeros_(model.gate.weight)
        nn.init.constant_(model.gate.bias, -200.0)
        with torch.no_grad():
            model.gate.bias.view(3, -1)[index] = 200.0
        torch.testing.assert_close(model(inputs), inputs[index], atol=0, rtol=0)


def test_softmax_gates_of_equal_scores_are_the_mean() -> None:
    config = FusionConfig("gated", (D, D), D, gate="softmax")
    model, inputs = build_fusion(config), inputs_of("additive", 5)[:2]
    nn.init.zeros_(model.gate.weight)
    nn.init.zeros_(model.gate.bias)
    torch.testing.assert_close(model(inputs), (inputs[0] + inputs[1]) / 2)


def test_a_gmu_of_two_is_the_papers_when_one_gate_mirrors_the_other() -> None:
    """h = z tanh(V_1 x_1) + (1 - z) tanh(V_2 x_2), since sigmoid(-a) = 1 - sigmoid(a)."""
    model, inputs = build_fusion(FusionConfig("gmu", (3, 5), D)), inputs_of("bilinear", 6)
    with torch.no_grad():
        model.gate.bias.zero_()
        model.gate.weight[D:] = -model.gate.weight[:D]
    z = (torch.cat(inputs, dim=-1) @ model.gate.weight[:D].mT).sigmoid()
    first, second = ((x @ v.weight.mT).tanh() for x, v in zip(inputs, model.project, strict=True))
    torch.testing.assert_close(model(inputs), z * first + (1 - z) * second)


def test_products_and_the_bilinear_form_equal_their_sums_over_indices() -> None:
    x = inputs_of("product", 3)
    torch.testing.assert_close(fusion(("product", "sigmoid", "vector"))(x), x[0] * x[1] * x[2])
    model, (first, second) = fusion(("bilinear", "sigmoid", "vector")), inputs_of("bilinear", 3)
    expected = torch.einsum("bi,dij,bj->bd", first, model.form.weight, second) + model.form.bias
    torch.testing.assert_close(model([first, second]), expected)
    model, x = fusion(("low_rank", "sigmoid", "vector")), inputs_of("low_rank", 3)
    factors = [(value @ u.weight.mT).tanh() for value, u in zip(x, model.factors, strict=True)]
    expected = torch.einsum("br,br,br,dr->bd", *factors, model.project.weight)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("case", ROBUST, ids="-".join)
def test_a_missing_modality_has_no_influence(case) -> None:
    model, inputs = fusion(case), inputs_of(case[0], 4)
    present = torch.ones(4, 3, dtype=torch.bool)
    torch.testing.assert_close(model(inputs, present), model(inputs))
    present[1, 0] = present[2, 1] = present[2, 2] = False
    found = model(inputs, present)
    assert torch.equal(found[[0, 3]], model(inputs)[[0, 3]])
    spoiled = [x.clone() for x in inputs]
    spoiled[0][1] = spoiled[1][2] = spoiled[2][2] = torch.nan
    assert torch.equal(model(spoiled, present), found)


def test_what_is_left_of_a_mean_is_the_mean_of_what_is_left() -> None:
    inputs = inputs_of("additive", 2)
    present = torch.tensor([[True, False, True], [False, False, True]])
    expected = torch.stack([(inputs[0][0] + inputs[2][0]) / 2, inputs[2][1]])
    for kind in ("additive", "gated"):
        model = build_fusion(FusionConfig(kind, (D, D, D), D, gate="softmax"))
        if kind == "gated":
            nn.init.zeros_(model.gate.weight)
            nn.init.zeros_(model.gate.bias)
        torch.testing.assert_close(model(inputs, present), expected)


@pytest.mark.parametrize("kind", NEED_ALL)
def test_kinds_that_need_every_modality_say_so(kind: str) -> None:
    model, inputs = fusion((kind, "sigmoid", "vector")), inputs_of(kind, 2)
    present = torch.ones(2, len(inputs), dtype=torch.bool)
    assert torch.equal(model(inputs, present), model(inputs))
    present[1, 0] = False
    with pytest.raises(ValueError, match=f"{kind}: expected every modality"):
        model(inputs, present)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "mfb"}, "kind: expected one of additive, linear_sum"),
        ({"gate": "tanh"}, "gate: expected one of sigmoid, softmax, got 'tanh'"),
        ({"gate_size": "matrix"}, "gate_size: expected one of scalar, vector"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"widths": (3,)}, r"widths: expected at least two positive numbers, got \[3\]"),
        ({"kind": "additive"}, r"widths: expected 4 \(width\) each for additive, got \[3, 5\]"),
        ({"kind": "bilinear", "widths": (3, 5, 2)}, "expected two modalities for bilinear"),
    ],
)
def test_a_config_that_cannot_work_is_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FusionConfig(**({"kind": "concat", "widths": (3, 5), "width": D} | arguments))


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_inputs_of_other_widths_are_named(case) -> None:
    with pytest.raises(ValueError, match=f"{case[0]}: expected widths"):
        fusion(case)([torch.zeros(2, 9), torch.zeros(2, 9)])
