"""Several tokens per call: the same tokens as one per call, and the exact joint distribution."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rudolph.generation.filters import TokenSamplingConfig, next_probabilities, sample_token
from rudolph.generation.generate import TO_SAMPLE, generate_image
from rudolph.generation.noise import NOISES, SamplingNoise, exponential_race, exponential_times
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.sequence.layout import SequenceLayout, Vocabulary

MASKS = ["causal", "row", "row_block", "column", "conv(3)", "conv_torus(3)"]
WINDOWS = [1, 2, 5, 40]
SAMPLINGS = {
    "plain": TokenSamplingConfig(),
    "filtered": TokenSamplingConfig(temperature=0.7, top_k=6, top_p=0.9),
    "greedy": TokenSamplingConfig(top_k=1),
    "extrapolation": TokenSamplingConfig(guidance=2.5),
    "mixture": TokenSamplingConfig(guidance=0.3, guidance_kind="mixture"),
}
LEFT = torch.tensor([[2, 7, 3, 0, 0], [2, 9, 11, 3, 0], [2, 3, 0, 0, 0]])
SEEDS = [11, 12, 21, 22, 31, 32]


def small_decoder(masks: Sequence[str] = ("row", "column"), **given: object) -> MaskedDecoder:
    torch.manual_seed(2)
    config = DecoderConfig(3, 24, 3, layer_masks=tuple(masks), last_layer_mask=None, **given)
    return MaskedDecoder(config, SequenceLayout(5, 4, 6), Vocabulary(20, 3, 5, 11, 2)).eval()


def given_tokens() -> Tensor:
    """Return known tokens: some at the same positions of all prompts, some at other positions."""
    known = torch.full((3, 16), TO_SAMPLE)
    known[:, [0, 1, 6, 7, 8, 15]] = torch.tensor([3, 0, 10, 2, 2, 5])
    known[0, 4], known[1, 9:12], known[2, 2] = 7, 1, 0
    return known


class Drawn(NamedTuple):
    """Sampled indices with their number of calls."""

    tokens: Tensor
    num_calls: int


def generate_image_speculatively(model: MaskedDecoder, left: Tensor, **asked: object) -> Drawn:
    calls: list[int] = []
    asked = {"on_token": calls.append} | asked
    told = asked["on_token"].__self__
    return Drawn(generate_image(model, left, **asked), len(told))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mask", [*MASKS, "mixed"])
def test_the_tokens_are_those_of_one_at_a_time(mask: str, window: int) -> None:
    model = small_decoder(MASKS if mask == "mixed" else [mask])
    for config in SAMPLINGS.values():
        asked = {"config": config, "seeds": SEEDS, "unconditional": LEFT[2]}
        found = generate_image_speculatively(model, LEFT, window=window, **asked)
        assert torch.equal(found.tokens, generate_image(model, LEFT, **asked))
        assert found.num_calls <= 16


@pytest.mark.parametrize("coupling", NOISES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_sample_is_the_same_for_every_window_alone_and_in_a_batch(
    sampling: str, coupling: str
) -> None:
    model = small_decoder(leading_bos=True)
    asked = {"config": SAMPLINGS[sampling], "unconditional": LEFT[2], "coupling": coupling}
    alone = [
        generate_image_speculatively(model, LEFT[at // 2][None], seeds=[seed], window=1, **asked)
        for at, seed in enumerate(SEEDS)
    ]
    assert all(drawn.num_calls == 16 for drawn in alone)
    for window in WINDOWS:
        found = generate_image_speculatively(model, LEFT, seeds=SEEDS, window=window, **asked)
        assert torch.equal(found.tokens, torch.cat([drawn.tokens for drawn in alone]))
    if coupling == "inversion" or sampling == "greedy":
        asked.pop("coupling")
        assert torch.equal(found.tokens, generate_image(model, LEFT, seeds=SEEDS, **asked))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sampling", ["plain", "extrapolation"])
def test_given_tokens_stay_and_cost_no_call(sampling: str, window: int) -> None:
    model, known, told = small_decoder(), given_tokens(), []
    asked = {"config": SAMPLINGS[sampling], "seeds": SEEDS, "unconditional": LEFT[2]}
    found = generate_image_speculatively(
        model, LEFT, window=window, known=known, on_token=told.append, **asked
    )
    assert torch.equal(found.tokens, generate_image(model, LEFT, known=known, **asked))
    assert len(told) == found.num_calls and told == sorted(set(told)) and told[-1] == 16
    assert found.num_calls <= 10 and (window > 1 or found.num_calls == 10)
    whole = known.clamp(min=0)
    found = generate_image_speculatively(model, LEFT, window=window, known=whole, **asked)
    assert torch.equal(found.tokens, whole.repeat_interleave(2, dim=0)) and not found.num_calls


@pytest.mark.parametrize("window", WINDOWS)
def test_a_model_that_always_says_the_same_takes_a_call_for_each_window(window: int) -> None:
    model = small_decoder()
    torch.nn.init.zeros_(model.to_logits.weight)
    calls = []
    model.final_norm.register_forward_hook(lambda *_: calls.append(1))
    found = generate_image_speculatively(
        model, LEFT, config=SAMPLINGS["greedy"], seeds=SEEDS, window=window
    )
    # The first guesses are uninformed.
    assert found.num_calls == 1 + -(-15 // window) == len(calls)


def tiny_decoder(num_codes: int) -> MaskedDecoder:
    """Return a decoder of 2 by 2 images whose tokens depend on each other."""
    torch.manual_seed(5)
    config = DecoderConfig(1, 8, 2, layer_masks=("causal",), last_layer_mask=None)
    vocabulary = Vocabulary(4, 0, 1, num_codes, 0)
    model = MaskedDecoder(config, SequenceLayout(1, 2, 0), vocabulary).eval()
    torch.nn.init.normal_(model.to_logits.weight, std=0.5)
    return model


@torch.inference_mode()
def conditionals(model: MaskedDecoder) -> list[Tensor]:
    """Return for each position its distributions after all prefixes, ``(V**place, V)``."""
    num_codes, found = model.vocabulary.codebook_size, []
    for place in range(4):
        before = list(itertools.product(range(num_codes), repeat=place))
        tokens = torch.tensor([(2, *row) for row in before])
        logits = model.image_logits(model.hidden(tokens)[:, -1])
        found.append(next_probabilities(logits, SAMPLINGS["plain"]).double())
    return found


def joint_of(model: MaskedDecoder) -> Tensor:
    """Return the probability of each image by the chain rule, ``(V**4,)``."""
    joint = torch.ones(1, dtype=torch.double)
    for shares in conditionals(model):
        joint = (joint[:, None] * shares).flatten()
    return joint


def all_images(tokens: Tensor, num_codes: int) -> Tensor:
    """Return the number of each image ``(B, 4)`` in the order of ``joint_of``."""
    return tokens @ num_codes ** torch.arange(3, -1, -1)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("coupling", "num_codes"), [("inversion", 2), ("inversion", 3), ("race", 2)]
)
def test_the_joint_distribution_is_the_chain_rules(
    monkeypatch: pytest.MonkeyPatch, coupling: str, num_codes: int, window: int
) -> None:
    """The joint distribution is exact, computed by integrating over the noise.

    The steps of all distribution functions at a position divide its noise into cells. Within a
    cell the sample does not depend on the noise, so one run represents the cell. A race between
    two codes needs one number, the first code's fraction of the total time. The first code wins
    if this fraction is below its probability.
    """
    model = tiny_decoder(num_codes)
    middles, widths = [], []
    for shares in conditionals(model):
        steps = shares.cumsum(-1)[:, :-1].flatten().unique()
        edges = torch.cat([torch.zeros(1), steps, torch.ones(1)]).double()
        middles.append(((edges[1:] + edges[:-1]) / 2).float())
        widths.append(edges.diff())
    found, counts = torch.zeros(num_codes**4, dtype=torch.double), set()
    for cell in itertools.product(*(range(len(row)) for row in middles[:3])):
        # No guess follows the last token, so its cells run as one batch.
        first = torch.stack([middles[place][at] for place, at in enumerate(cell)])
        uniform = torch.cat([first.expand(len(middles[3]), 3), middles[3][:, None]], dim=1)
        noise = uniform if coupling == "inversion" else torch.stack([uniform, 1 - uniform], -1)
        fixed = SamplingNoise(lambda *_, noise=noise: noise, NOISES[coupling].sample)
        monkeypatch.setitem(NOISES, coupling, fixed)
        drawn = generate_image_speculatively(
            model,
            torch.tensor([[2]]),
            config=SAMPLINGS["plain"],
            seeds=range(len(uniform)),
            window=window,
            coupling=coupling,
        )
        volume = torch.stack([widths[place][at] for place, at in enumerate(cell)]).prod()
        found.index_add_(0, all_images(drawn.tokens, num_codes), volume * widths[3])
        counts.add(drawn.num_calls)
    torch.testing.assert_close(found, joint_of(model), atol=1e-6, rtol=0)
    # Every possible number of calls occurs.
    assert counts == set(range(1 - (-3 // window), 5))


def test_races_draw_the_joint_distribution() -> None:
    model, num_samples = tiny_decoder(3), 20_000
    found = torch.zeros(81, dtype=torch.double)
    for start in range(0, num_samples, 40):
        drawn = generate_image_speculatively(
            model,
            torch.tensor([[2]]),
            config=SAMPLINGS["plain"],
            seeds=range(start, start + 40),
            window=3,
            coupling="race",
        )
        found += torch.bincount(all_images(drawn.tokens, 3), minlength=81)
    expected = joint_of(model) * num_samples
    # Chi squared has mean 80 and standard deviation 12.6.
    assert ((found - expected) ** 2 / expected).sum() < 80 + 4 * 12.6


def test_near_distributions_agree_more_often_in_a_race_than_their_distance_promises() -> None:
    torch.manual_seed(0)
    one = torch.randn(50).softmax(-1)
    other = (one.log() + 0.3 * torch.randn(50)).softmax(-1)
    distance = (one - other).abs().sum() / 2
    times = exponential_times(range(20), 1000, 50).flatten(0, 1)
    rows = [exponential_race(shares.expand(len(times), -1), times) for shares in (one, other)]
    uniform = torch.rand(len(times))
    inverted = [sample_token(shares.expand(len(times), -1), uniform) for shares in (one, other)]
    same, same_inverted = ((x == y).float().mean() for x, y in (rows, inverted))
    assert same > (1 - distance) / (1 + distance) > same_inverted
    counts = torch.bincount(rows[0], minlength=50) / len(times)
    torch.testing.assert_close(counts, one, atol=0.01, rtol=0)


def test_a_code_that_may_not_be_drawn_never_wins() -> None:
    shares = torch.tensor([[0.0, 1e-30, 0.0, 1.0 - 1e-30]])
    times = exponential_times([4], 5000, 4)[0]
    times[0] = torch.tensor([torch.finfo(torch.float32).tiny, 30.0, 1.0, 30.0])
    assert set(exponential_race(shares.expand(5000, -1), times).tolist()) == {3}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"coupling": "dice"}, "inversion, race"),
        ({"config": SAMPLINGS["mixture"]}, "unconditional"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong: dict[str, object], told: str) -> None:
    asked = {"config": SAMPLINGS["plain"], "seeds": [1, 2, 3], "window": 2} | wrong
    with pytest.raises(ValueError, match=told):
        generate_image_speculatively(small_decoder(), LEFT, **asked)
