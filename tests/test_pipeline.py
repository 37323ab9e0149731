"""From a text to ranked, upscaled images: each stage alone, all together, and as a command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_weights import SIDE, write_all
from torch import Tensor

from rudolph.cli import main
from rudolph.data.seeds import mixed_seed
from rudolph.generation.filters import TokenSamplingConfig, filter_logits, next_probabilities
from rudolph.generation.generate import TO_SAMPLE
from rudolph.generation.image_prompts import border_mask, known_indices
from rudolph.generation.pipeline import Candidate, GenerationRequest, Pipeline
from rudolph.generation.png import read_text_fields, to_image
from rudolph.generation.ranking import rank_images
from rudolph.generation.tiled_upscaling import upscale_tiled
from rudolph.runs.resolve import Precision, open_clip, open_model, open_upscaler

NUM_IMAGE = SIDE**2
TEXT = "Красный круг"
PLAIN = TokenSamplingConfig()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of weights for each name in ``tiny_weights.KINDS``."""
    return write_all(tmp_path_factory.mktemp("weights"))


def pipeline_of(weights: Path, name: str = "rudolph", *, batch_size: int = 64) -> Pipeline:
    pipeline = open_model(str(weights / name), runs=weights, uri="").pipeline
    pipeline.batch_size = batch_size
    return pipeline


def generate(pipeline: Pipeline, request: GenerationRequest, **filters: Any) -> list[Candidate]:
    return pipeline.generate(TEXT, request, config=replace(PLAIN, **filters))


def indices_of(candidates: list[Candidate]) -> Tensor:
    return torch.stack([candidate.indices for candidate in candidates])


@pytest.mark.parametrize("scale", [None, 2, 4])
@pytest.mark.parametrize(
    ("rank", "has_clip"),
    [("none", False), ("none", True), ("self", False), ("self", True), ("clip", True)],
)
def test_every_stage_is_optional_and_leaves_its_scores(
    weights: Path, rank: str, has_clip: bool, scale: int | None
) -> None:
    pipeline = pipeline_of(weights)
    drawn = generate(pipeline, GenerationRequest(6))
    images = torch.stack([candidate.image for candidate in drawn])
    assert torch.equal(images, pipeline.decode(indices_of(drawn)))
    assert [candidate.seed for candidate in drawn] == [mixed_seed(0, at) for at in range(6)]
    ranking = rank_images(pipeline, indices_of(drawn), TEXT)
    similar = open_clip(str(weights / "clip")).similarities(images, [TEXT])[:, 0]
    orders = {"none": list(range(6)), "self": ranking.order()}
    orders["clip"] = sorted(range(6), key=lambda at: -similar[at])
    assert len({tuple(order) for order in orders.values()}) == 3
    pipeline.clip = open_clip(str(weights / "clip")) if has_clip else None
    pipeline.upscaler = open_upscaler(str(weights / f"x{scale}")) if scale else None
    found = generate(pipeline, GenerationRequest(6, keep=4, rank=rank))
    assert [drawn[at].seed for at in orders[rank][:4]] == [each.seed for each in found]
    for at, candidate in zip(orders[rank], found, strict=False):
        assert torch.equal(candidate.indices, drawn[at].indices)
        expected = {"clip": similar[at]} if has_clip else {}
        if rank == "self":
            expected |= {"perplexity_text": ranking.text[at], "self": ranking.score[at]}
            expected |= {"perplexity_image": ranking.image[at]}
        assert candidate.scores == pytest.approx({key: float(expected[key]) for key in expected})
        image = drawn[at].image
        larger = upscale_tiled(pipeline.upscaler, image[None])[0] if scale else image
        torch.testing.assert_close(candidate.image, larger)
        assert candidate.image.shape == (3, 8 * (scale or 1), 8 * (scale or 1))


@pytest.mark.parametrize(
    "filters", [{"temperature": 0.8}, {"top_k": 9, "top_p": 0.9, "guidance": 2.5}]
)
@pytest.mark.parametrize("name", ["rudolph", "rudalle_v2"])
def test_a_image_depends_on_its_seed_and_place_alone(
    weights: Path, name: str, filters: dict[str, Any]
) -> None:
    stays = border_mask({"up": 1, "left": 1}, SIDE).flatten()
    for known in (None, torch.where(stays, torch.arange(NUM_IMAGE), TO_SAMPLE)):
        request = GenerationRequest(5, seed=3, known=known)
        expected = indices_of(generate(pipeline_of(weights, name), request, **filters))
        assert len({tuple(row) for row in expected.tolist()}) > 2
        if known is not None:
            assert (expected[:, stays] == known[stays]).all()
        for batch_size in (1, 2, 3):
            pipeline = pipeline_of(weights, name, batch_size=batch_size)
            fewer = indices_of(generate(pipeline, replace(request, number=3), **filters))
            assert torch.equal(fewer, expected[:3])
            kept = generate(pipeline, replace(request, keep=2, rank="self"), **filters)
            seeds = [mixed_seed(3, at) for at in range(5)]
            for candidate in kept:
                assert torch.equal(candidate.indices, expected[seeds.index(candidate.seed)])
        other = indices_of(generate(pipeline, replace(request, seed=4), **filters))
        assert not torch.equal(other, expected)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_no_more_than_a_batch_is_drawn_captioned_or_judged_at_once(
    weights: Path, guidance: float | None
) -> None:
    expected = pipeline_of(weights)
    pipeline = pipeline_of(weights, batch_size=3)
    sizes: list[int] = []
    pipeline.decoder.layers[0].register_forward_pre_hook(
        lambda _, given: sizes.append(len(given[0]))
    )
    generate(pipeline, GenerationRequest(8, rank="self"), guidance=guidance)
    assert set(sizes) <= ({1, 2, 3} if guidance is None else {1, 2, 3, 4, 6})
    images = torch.rand(3, 3, 8, 8)
    for num_samples in (1, 2, 5):
        seeds = range(3 * num_samples)
        captions = pipeline.caption(images, config=PLAIN, seeds=seeds)
        assert captions == expected.caption(images, config=PLAIN, seeds=seeds)
        generated = pipeline.generate_images([TEXT, "", "синий"], config=PLAIN, seeds=seeds)
        again = expected.generate_images([TEXT, "", "синий"], config=PLAIN, seeds=seeds)
        torch.testing.assert_close(generated, again)


def test_every_stage_tells_its_progress(weights: Path) -> None:
    pipeline = pipeline_of(weights, batch_size=2)
    pipeline.clip = open_clip(str(weights / "clip"))
    pipeline.upscaler = open_upscaler(str(weights / "x2"))
    told: dict[str, list[tuple[int, int]]] = {}
    pipeline.generate(
        TEXT,
        GenerationRequest(5, keep=3, rank="self"),
        config=PLAIN,
        on_stage=lambda stage, done, total: told.setdefault(stage, []).append((done, total)),
    )
    totals = {"sample": 5 * NUM_IMAGE, "decode": 5, "rank": 5, "clip": 5, "upscale": 3}
    assert list(told) == list(totals)
    for stage, total in totals.items():
        steps = [done for done, _ in told[stage]]
        assert steps == sorted(set(steps)) and steps[-1] == total
        assert {each for _, each in told[stage]} == {total}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"number": 0}, "number must be at least 1, got 0"),
        ({"number": 4, "keep": 5}, "keep must be 1 to the number 4, got 5"),
        ({"keep": 0}, "keep must be 1 to the number 8"),
        ({"rank": "best"}, "rank must be one of none, self, clip, got 'best'"),
        ({"perplexity": "ppl"}, "perplexity must be one of exp_mean_ce, mean_exp_ce, got 'ppl'"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerationRequest(**fields)


def test_a_stage_without_its_model_is_refused(weights: Path) -> None:
    pipeline = pipeline_of(weights)
    with pytest.raises(ValueError, match="rank clip: expected a pipeline with a CLIP"):
        generate(pipeline, GenerationRequest(2, rank="clip"))
    with pytest.raises(ValueError, match="expected a pipeline with an upscaler"):
        pipeline.upscale(torch.rand(1, 3, 8, 8), on_tile=lambda done, total: None)
    with pytest.raises(ValueError, match="image_captioning: expected a decoder with a right text"):
        pipeline_of(weights, "rudalle_v3").caption(torch.rand(1, 3, 8, 8), config=PLAIN, seeds=[1])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        replace(pipeline, batch_size=0)


CASES = [("mixture", weight) for weight in (0.0, 0.2, 1.0)]
CASES += [("extrapolation", scale) for scale in (0.0, 0.5, 1.0, 3.0)]


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_a_mixture_is_of_filtered_shares_and_an_extrapolation_of_logits_before_the_filters(
    kind: str, number: float
) -> None:
    both = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    filters = TokenSamplingConfig(temperature=0.7, top_k=5, top_p=0.8)
    found = next_probabilities(
        both[0], replace(filters, guidance=number, guidance_kind=kind), both[1]
    )
    if kind == "mixture":
        shares = [filter_logits(logits, filters).softmax(-1) for logits in both]
        expected = (1 - number) * shares[0] + number * shares[1]
    else:
        logits = filter_logits(number * both[0] + (1 - number) * both[1], filters)
        expected = logits.softmax(-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["rudolph", "rudalle_v2"])
def test_guidance_of_either_name_leads_from_the_empty_text_in_one_pass(
    weights: Path, name: str
) -> None:
    pipeline = pipeline_of(weights, name)
    calls: list[tuple[int, ...]] = []
    pipeline.decoder.layers[0].register_forward_pre_hook(
        lambda _, given: calls.append(tuple(given[0].shape[:2]))
    )

    def drawn(text: str, guidance: float | None, kind: str = "mixture") -> Tensor:
        calls.clear()
        config = TokenSamplingConfig(guidance=guidance, guidance_kind=kind)
        return pipeline.generate_indices([text], config=config, seeds=[1, 2, 3])

    with_text, without = drawn(TEXT, None), drawn("", None)
    assert calls == [(1, calls[0][1])] + [(3, 1)] * (NUM_IMAGE - 1)
    assert torch.equal(drawn(TEXT, 0.0), with_text)
    assert calls == [(2, calls[0][1])] + [(6, 1)] * (NUM_IMAGE - 1)
    assert torch.equal(drawn(TEXT, 1.0), without)
    assert torch.equal(drawn(TEXT, 1.0, "extrapolation"), with_text)
    assert torch.equal(drawn(TEXT, 0.0, "extrapolation"), without)
    assert not torch.equal(with_text, without)


Verb = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def verb(weights: Path, tmp_path: Path, monkeypatch) -> Verb:
    """Return a call of ``rudolph generate`` in a new folder; it returns JSON records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUDOLPH_WEIGHTS", str(tmp_path / "home"))
    noise = np.random.default_rng(0).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    Image.fromarray(noise).save("image.png")
    Image.fromarray(noise[:, :30] // 128 * 255).save("square.png")

    def call(*arguments: str, model: str = "rudolph") -> list[dict[str, Any]]:
        source = model if "/" in model else str(weights / model)
        assert main(["generate", TEXT, "--model", source, *arguments]) == 0
        return [
            json.loads(line)
            for line in Path("generated.jsonl").read_text(encoding="utf-8").splitlines()
        ]

    return call


def pixels(records: list[dict[str, Any]]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(record["file"])) for record in records])


def test_the_verb_draws_from_a_run_through_every_stage(
    weights: Path, finished: Path, verb: Verb, capsys
) -> None:
    stages = ["--rank", "clip", "--clip", str(weights / "clip"), "--upscale", "4"]
    stages += ["--upscaler", str(weights / "x4"), "--seed", "7"]
    given = ["--image-prompt", "image.png", "--borders", "up=2,left=1"]
    records = verb("-n", "5", "--keep", "2", *stages, *given, model=str(finished))
    said = capsys.readouterr().err
    # The VQ-GAN of the run has 6 x 6 tokens.
    for line in ("sample: 180/180", "decode: 5/5", "clip: 5/5", "upscale: 2/2", "2 images"):
        assert line in said
    source = open_model(str(finished), runs=finished, uri="")
    pipeline = source.pipeline
    pipeline.clip = open_clip(str(weights / "clip"))
    pipeline.upscaler = open_upscaler(str(weights / "x4"))
    square = Image.open("image.png").crop((6, 0, 36, 30)).resize((24, 24), Image.BICUBIC)
    image = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    stays = border_mask({"up": 2, "left": 1}, 6)
    known = known_indices(pipeline.vqgan, image, stays)
    request = GenerationRequest(5, 2, "clip", seed=7, known=known)
    expected = pipeline.generate(TEXT, request, config=source.sampling.image)
    for record, candidate in zip(records, expected, strict=True):
        assert (candidate.indices[stays.flatten()] == known[stays.flatten()]).all()
        assert record["scores"] == pytest.approx(candidate.scores)
        assert record["seed"] == candidate.seed
        assert (record["prompt"], record["model"]) == (TEXT, str(finished))
        told: dict[str, Any] = read_text_fields(Path(record["file"]))
        told |= {name: json.loads(told[name]) for name in ("seed", "parameters", "scores")}
        assert told | {"file": record["file"]} == record
        asked = {"seed": 7, "number": 5, "keep": 2, "rank": "clip", "upscale": 4}
        asked |= {"image_prompt": "image.png", "borders": "up=2,left=1", "temperature": 1.0}
        assert asked.items() <= record["parameters"].items()
    assert (pixels(records) == [np.asarray(to_image(each.image)) for each in expected]).all()
    assert np.asarray(Image.open("generated.png")).shape[1] > 2 * 96


@pytest.mark.parametrize("model", ["rudolph", "rudalle_v2", "rudalle_v3"])
def test_the_verb_draws_from_a_folder_of_weights(weights: Path, verb: Verb, model: str) -> None:
    plain = verb("-n", "4", model=model)
    assert all(record["scores"] == {} for record in plain)
    drawn = {record["seed"]: image for record, image in zip(plain, pixels(plain), strict=True)}
    orders = []
    for perplexity in ("exp_mean_ce", "mean_exp_ce"):
        ranked = verb("-n", "5", "--rank", "self", "--perplexity", perplexity, model=model)
        assert {"perplexity_text", "perplexity_image", "self"} == set(ranked[0]["scores"])
        orders.append([record["scores"]["self"] for record in ranked])
        assert orders[-1] == sorted(orders[-1]) and orders[-1][0] < orders[-1][-1]
        for record, image in zip(ranked, pixels(ranked), strict=True):
            assert (drawn.get(record["seed"], image) == image).all()
    assert orders[0] != orders[1]


def test_the_reference_filters_of_a_folder_of_weights_give_way_to_those_given(verb: Verb) -> None:
    (record,) = verb("-n", "1", model="rudalle_v3")
    assert (record["parameters"]["top_k"], record["parameters"]["top_p"]) == (2048, 0.995)
    filters = ["--top-k", "7", "--guidance", "0.3", "--guidance-kind", "mixture"]
    (record,) = verb("-n", "1", *filters, model="rudalle_v3")
    expected = {"top_k": 7, "top_p": 0.995, "guidance": 0.3, "guidance_kind": "mixture"}
    assert expected.items() <= record["parameters"].items()


@pytest.mark.parametrize("model", ["rudolph", "rudalle_v2"])
def test_an_image_prompt_may_be_borders_a_mask_or_a_share(
    weights: Path, verb: Verb, model: str
) -> None:
    prompt = ["-n", "3", "--image-prompt", "square.png"]
    Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 4), (8, 1))).save("half.png")
    Image.new("L", (8, 8), "black").save("nothing.png")
    borders = pixels(verb(*prompt, "--borders", "left=2", model=model))
    assert (borders == pixels(verb(*prompt, "--mask", "half.png", model=model))).all()
    plain = pixels(verb("-n", "3", model=model))
    assert (plain == pixels(verb(*prompt, "--vary", "1", model=model))).all()
    assert not (plain == borders).all()
    varied = pixels(verb(*prompt, "--vary", "0.3", model=model))
    assert len({image.tobytes() for image in varied}) > 1
    vqgan = pipeline_of(weights, model).vqgan
    square = np.array(Image.open("square.png").resize((8, 8), Image.Resampling.BICUBIC))
    image = torch.from_numpy(square).permute(2, 0, 1)[None] / 255
    expected = np.asarray(to_image(vqgan.decode_indices(vqgan.encode_indices(image))[0]))
    for everything in (["--borders", "up=4"], ["--mask", "nothing.png"]):
        assert (pixels(verb(*prompt, *everything, model=model)) == expected).all()


@pytest.mark.parametrize(
    "precision", [["--dtype", "bfloat16"], ["--dtype", "float16"], ["--int8"]]
)
def test_weights_in_less_precision_pass_through_every_stage(
    weights: Path, verb: Verb, precision: list[str]
) -> None:
    stages = ["--rank", "self", "--clip", str(weights / "clip"), "--transparent"]
    stages += ["--upscaler", str(weights / "x2"), "--guidance", "2"]
    prompt = ["--image-prompt", "image.png", "--vary", "0.5"]
    records = verb("-n", "3", *stages, *prompt, *precision)
    assert pixels(records).shape == (3, 16, 16, 4)
    for record in records:
        assert all(np.isfinite(score) for score in record["scores"].values())
        assert set(record["scores"]) == {"perplexity_text", "perplexity_image", "self", "clip"}
    source = str(weights / "rudolph")
    assert main(["caption", "image.png", "-n", "2", "--model", source, *precision]) == 0


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eight_bits_go_with_every_dtype_and_without_a_kernel_for_them(
    weights: Path, finished: Path, verb: Verb, monkeypatch, dtype: str, has_kernels: bool
) -> None:
    if not has_kernels:
        # As on a GPU, and on processors without such products in torch.
        monkeypatch.setattr(
            "rudolph.models.cpu.prepacked_linear.layout_works", lambda layout: False
        )
    flags = ["--int8", "--dtype", dtype]
    for model in (str(finished), "rudolph"):
        records = verb("-n", "2", "--rank", "self", "--guidance", "2", *flags, model=model)
        assert all(np.isfinite(list(record["scores"].values())).all() for record in records)
        source = model if "/" in model else str(weights / model)
        assert main(["caption", "image.png", "-n", "2", "--model", source, *flags]) == 0


def test_images_are_float32_whatever_the_weights_are(weights: Path) -> None:
    precision = Precision(torch.bfloat16)
    source = open_model(str(weights / "rudolph"), runs=weights, uri="", precision=precision)
    mixed = pipeline_of(weights).to("cpu", image_dtype=torch.bfloat16)
    for pipeline in (source.pipeline, mixed):
        (candidate,) = generate(pipeline, GenerationRequest(1))
        assert candidate.image.dtype == torch.float32
    assert mixed.vqgan.quant_conv.weight.dtype != mixed.decoder.final_norm.weight.dtype


PROMPT = ["--image-prompt", "image.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--borders", "up=1"], "--borders: expected --image-prompt IMAGE with it"),
        (["--mask", "image.png"], "--mask: expected --image-prompt"),
        (["--vary", "0.5"], "--vary: expected --image-prompt"),
        (PROMPT, "--image-prompt: expected one of --borders, --mask and --vary with it, got 0"),
        ([*PROMPT, "--borders", "up=1", "--vary", "0.5"], "--mask and --vary with it, got 2"),
        ([*PROMPT, "--borders", "top=1"], "borders: expected up, down, left, right, got 'top'"),
        ([*PROMPT, "--borders", "up=5"], "border up: expected 0 to 4 tokens, got 5"),
        ([*PROMPT, "--borders", "up=1,up=2"], "borders: expected each side once"),
        (
            [*PROMPT, "--borders", "up"],
            "borders: expected widths in tokens like up=4,left=2, got 'up'",
        ),
        (
            [*PROMPT, "--vary", "0"],
            "fraction to sample again: expected above 0 and at most 1, got 0.0",
        ),
        ([*PROMPT, "--mask", "nowhere.png"], "nowhere.png: no such file or directory"),
        (["--image-prompt", "nowhere.png", "--vary", "1"], "nowhere.png: no such file"),
        (["--image-prompt", "text.png", "--vary", "1"], "text.png: corrupt image"),
        (["-n", "4", "--keep", "5"], "keep must be 1 to the number 4, got 5"),
        (["--rank", "clip"], "Run `rudolph pull ruclip-vit-base-patch32-384`"),
        (["--clip", "W/x4"], "W/x4: expected a CLIP, got a Upscaler"),
        (["--upscale", "8"], "Run `rudolph pull RealESRGAN-x8`"),
        (["--upscaler", "W/clip"], "W/clip: expected a Upscaler, got a CLIP"),
        (
            ["--upscaler", "W/x2", "--upscale", "4"],
            "--upscale: expected 2 with this --upscaler, got 4",
        ),
        (["--guidance", "2", "--guidance-kind", "mixture"], "guidance must be at most 1 for a"),
        (["--guidance-kind", "mixture"], "--guidance-kind: expected --guidance with it"),
        (["--output", "images"], "--output must end with .png, got images"),
        (
            ["--model", "W/clip"],
            "clip: expected a model that generates images, got a ruclip model",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    weights: Path, verb: Verb, capsys, arguments: list[str], words: str
) -> None:
    Path("W").symlink_to(weights)
    Path("text.png").write_text("no image", encoding="utf-8")
    assert main(["generate", TEXT, "--model", "W/rudolph", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rudolph: ") and words in line
    assert not list(Path().glob("generated*"))
