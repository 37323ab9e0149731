"""Experiment files: how they expand, and one-line messages for a hundred errors."""

import copy
import json
import math
import random
import string
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rudolph.checkpoints.releases import RELEASED
from rudolph.cli import main
from rudolph.config.experiment_file import load_experiment
from rudolph.config.run import CONFIG_VERSION, RunConfig, digest_of, read_run, run_yaml, to_plain
from rudolph.files.settings import ConfigError, json_schema
from rudolph.models.reference import empty_model
from rudolph.training.optim import OptimConfig

ROOT = Path(__file__).parent.parent

GOOD: dict[str, Any] = {
    "title": "A test",
    "question": "Is this file read?",
    "settings": {
        "data": {"dataset": "shapes", "image_size": 32},
        "vqgan": {"resolution": 32, "channels": [8, 16, 16], "quantizer.num_codes": 64},
        "model.layer_masks": ["row", "conv(3)"],
        "optim": {"learning_rate": 0.001, "num_steps": 5},
        "sampling": {"image": {"top_k": 5}},
        "evaluation.evaluators": ["reconstruction"],
    },
    "variants": {"small": {"model.num_layers": 2}, "large": {"model": {"num_layers": 4}}},
    "grid": {"sampling.image.temperature": [0.5, 1.0]},
    "seeds": [0, 7],
    "targets": {"vqgan/psnr/train": 20},
    "report": {"table": ["vqgan/psnr/train"], "curves": []},
}


def write(folder: Path, content: Any, name: str = "test.yaml") -> Path:
    path = folder / name
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return path


def test_variants_grid_and_seeds_are_expanded_in_order(tmp_path: Path) -> None:
    runs = load_experiment(write(tmp_path, GOOD)).runs
    found = [
        (run.config.decoder.num_layers, run.config.sampling.image.temperature, run.config.seed)
        for run in runs
    ]
    assert found == [(n, t, s) for n in (2, 4) for t in (0.5, 1.0) for s in (0, 7)]
    assert len({run.name for run in runs}) == len({run.config.digest for run in runs}) == 8
    assert runs[0].name == "small-temperature=0.5-seed0"
    assert runs[0].config.decoder.layer_masks == ("row", "conv(3)")


@pytest.mark.parametrize("size", ["350m", "1.3b", "2.7b"])
def test_the_base_of_a_released_size_is_that_of_its_file(tmp_path: Path, size: str) -> None:
    name = f"RUDOLPH-{size.upper()}" if size != "350m" else "RUDOLPH-350M"
    base = ROOT / "experiments" / "base" / f"rudolph_{size}.yaml"
    content = {"title": "t", "question": "q", "base": str(base), "settings": {}}
    content["settings"] = {"data.manifest.path": "pairs.csv"}
    config = load_experiment(write(tmp_path, content)).runs[0].config
    assert config.model.init == config.tokenizer.path == name
    model = empty_model("rudolph", RELEASED[name].config)
    assert config.sequence_layout == model.layout
    assert replace(config.vocabulary, num_image_specials=0) == replace(
        model.vocabulary, num_image_specials=0
    )
    assert config.decoder.architecture == model.config
    vqgan = empty_model("vqgan", RELEASED[str(config.vqgan.init)].config)
    assert replace(config.vqgan, init=None) == vqgan.config
    assert config.data.image_size // config.vqgan.factor == model.layout.image_tokens_per_dim


def test_a_base_stands_below_settings_and_the_command_line_above_all(tmp_path: Path) -> None:
    write(tmp_path, {"data.image_size": 32, "vqgan.resolution": 32, "seed": 1}, "base.yaml")
    path = write(tmp_path, {"title": "t", "question": "q", "base": "base.yaml"})
    with pytest.raises(ConfigError, match="seeds are listed"):
        load_experiment(path)
    base = {"data.image_size": 32, "vqgan.resolution": 32, "model.num_layers": 3}
    write(tmp_path, {**base, "model.num_heads": 2}, "base.yaml")
    settings = {"model.num_heads": 4}
    path = write(
        tmp_path, {"title": "t", "question": "q", "base": "base.yaml", "settings": settings}
    )
    config = load_experiment(path, ["model.num_layers=9", "seed=5"]).runs[0].config
    assert (config.decoder.num_layers, config.decoder.num_heads, config.seed) == (9, 4, 5)


def test_a_resolved_run_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_experiment(write(tmp_path, GOOD)).runs[3].config
    again = read_run(write(tmp_path, run_yaml(config), "config.yaml"))
    assert again == config and again.digest == config.digest


def test_the_digest_depends_on_every_setting(tmp_path: Path) -> None:
    config = load_experiment(write(tmp_path, GOOD)).runs[0].config
    changes = [
        "seed=3",
        "data.flip_probability=0.5",
        "vqgan_losses.l1_weight=2.0",
        "sampling.text.top_k=2",
    ]
    digests = {load_experiment(write(tmp_path, GOOD), [c]).runs[0].config.digest for c in changes}
    assert len(digests | {config.digest}) == 5


def test_a_setting_that_is_new_and_at_its_default_changes_no_digest() -> None:
    optim = OptimConfig(num_steps=7)

    @dataclass(frozen=True)
    class Extended(OptimConfig):
        lookahead: int = 0
        groups: OptimConfig = field(default_factory=lambda: optim)

    assert digest_of(Extended(num_steps=7)) == digest_of(optim)
    others = [Extended(num_steps=7, lookahead=1), Extended(num_steps=7, groups=OptimConfig())]
    assert len({digest_of(each) for each in (optim, *others)}) == 3


def test_a_default_changes_only_with_the_version_of_the_configuration() -> None:
    golden = json.loads((Path(__file__).parent / "defaults.json").read_text("utf-8"))
    assert golden["version"] == CONFIG_VERSION, "write tests/defaults.json anew"
    now = {
        part.name: flat(to_plain(part.default_factory()))
        for part in fields(RunConfig)
        if part.default_factory is not MISSING
    }
    changed = {
        f"{part}.{name}": now[part].get(name)
        for part, defaults in golden["defaults"].items()
        for name, default in defaults.items()
        if now[part].get(name) != default
    }
    assert changed == {}, "count CONFIG_VERSION up: results were made with other defaults"


def flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= (
            flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
        )
    return found


def test_numbers_in_e_notation_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD).replace("0.001", "1e-3")
    assert "1e-3" in text
    runs = load_experiment(write(tmp_path, text)).runs
    assert runs[0].config.optim.learning_rate == 0.001


def test_the_schema_names_every_setting() -> None:
    schema = json_schema(RunConfig)
    assert set(schema["properties"]) == set(to_plain(RunConfig(**FITTING)))


FITTING = {"data": RunConfig.__dataclass_fields__["data"].default_factory()}
FITTING |= {
    "vqgan": type(RunConfig.__dataclass_fields__["vqgan"].default_factory())(resolution=32)
}


def mutations() -> list[tuple[str, Any]]:
    """Return a hundred files with one error each, and a word that the message must contain."""
    rng = random.Random(0)
    leaves = leaf_paths(to_plain(RunConfig(**FITTING)))
    leaves = [
        leaf for leaf in leaves if leaf[0] != "seed" and not leaf[0].startswith("data.tasks")
    ]
    found: list[tuple[str, Any]] = []
    for path, value in leaves:
        # A list is not a number, a text, a switch or null.
        wrong = {"a": 1} if isinstance(value, list) else [[]]
        found.append((path, changed({"settings": {path: wrong}})))
    for path, _ in rng.sample(leaves, 30):
        name = path.rpartition(".")[2]
        position = rng.randrange(len(name))
        typo = name[:position] + rng.choice(string.ascii_lowercase) + name[position:]
        wrong_path = f"{path[: len(path) - len(name)]}{typo}"
        found.append((wrong_path, changed({"settings": {wrong_path: 1}})))
    for key in GOOD:
        found.append((f"{key}x", changed({f"{key}x": GOOD[key]})))
        if key not in ("title", "question"):
            found.append((key, changed({key: 7})))
    return found


def leaf_paths(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            found += leaf_paths(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """Return a valid file with one change; changed settings replace all others."""
    content = copy.deepcopy(GOOD)
    content.pop("grid")
    if isinstance(change.get("settings"), dict):
        fitting = {"data.image_size": 32, "vqgan.resolution": 32}
        content.pop("variants")
        change = {"settings": fitting | change["settings"]}
        content["settings"] = {}
    return content | change


def test_there_are_at_least_a_hundred_mutations() -> None:
    assert len(mutations()) >= 100


@pytest.mark.parametrize("number", range(100))
def test_a_mutated_file_gets_one_line_with_file_and_key(tmp_path: Path, number: int) -> None:
    place, content = mutations()[number]
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert place in message, message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.num_layer", 3, "legal are family, init, num_layers, hidden_size"),
        ("model.num_layer", 3, "did you mean model.num_layers?"),
        ("dekoder.num_layers", 3, "did you mean model.num_layers?"),
        (
            "data.dataset",
            "emojis",
            "interleaved, got 'emojis'; did you mean emoji?",
        ),
        ("model.layer_masks", ["colum"], "did you mean column?"),
        ("sampling.image.top_k", 0, "sampling.image.top_k must be at least 1 or null, got 0"),
        ("optim.learning_rate", "fast", "must be a valid number, got 'fast'"),
        ("optim.learning_rate", float("nan"), "finite number, got nan"),
        ("data.tasks", {"text_to_image": float("nan")}, "data.tasks.text_to_image"),
        ("sampling.text.temperature", 1e-40, "temperature must be 1e-06 to 1e+06, got 1e-40"),
        ("sampling.text.guidance", float("inf"), "finite number, got inf"),
        ("sampling.image.top_p", -0.5, "top_p must be in (0, 1] or null, got -0.5"),
        ("sampling.image.min_p", float("nan"), "finite number, got nan"),
        ("model.pb_relax", "yes", "must be a valid boolean"),
        ("vqgan.resolution", 64, "must equal data.image_size (32), got 64"),
        ("data.tasks", {"vqa": 1.0}, "data.tasks must be of text_to_image"),
        ("evaluation.evaluators", ["caption"], "did you mean caption_f1?"),
        ("evaluation.evaluators", ["scene_accuracy"], "needs data.dataset shapes, got 'emoji'"),
        (
            "evaluation.evaluators",
            ["words/zero_shot_classification"],
            "needs a dataset of emoji, shapes, got 'w",
        ),
        ("evaluation.evaluators", ["words/text_ranking"], "text_ranking needs a dataset of emoji"),
        (
            "evaluation.evaluators",
            ["clip_score"],
            "expected a CLIP for clip_score, got null",
        ),
        ("data.dataset", "x" * 3000, f"got '{'x' * 80}...'"),
        ("evaluation.splits", ["tran"], "did you mean train?"),
        ("vqgan.z_channels", -1, "z_channels must be at least 1, got -1"),
        ("vqgan_optim.num_steps", 0, "must be at least 1 without vqgan.init, got 0"),
        ("optim.num_steps", 0, "optim.num_steps: must be at least 1 without model.init, got 0"),
        ("optim.num_steps", -1, "num_steps must be at least 0, got -1"),
        ("evaluation.missing_image", "zero", "must be one of zeros, legacy, got 'zero'"),
    ],
)
def test_a_message_says_what_is_legal_and_the_nearest_name(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, changed({"settings": {key: value}})))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: [1", "line"),
        ("- a\n- b", "must be a mapping of keys"),
        ("title: a\ntitle: b", "key title is given twice"),
        ("title: a\nquestion: ''", "question: is missing"),
        (
            "title: a\nquestion: b\nsettings: {data.image_size: 16, data: {image_size: 32}}",
            "given twice",
        ),
        ("title: a\nquestion: b\nbase: nowhere.yaml", "nowhere.yaml: no such file"),
        ("title: a\nquestion: b\nseeds: [1, 1]", "must not hold a value twice"),
        ("title: a\nquestion: b\nvariants: {a b: {}}", "names must be"),
        (f"title: {'[' * 5000}", "not YAML (nested too deeply)"),
        ("title: 2026-99-99", "not YAML (month must be in 1..12)"),
        (f"title: {'9' * 5000}", "not YAML (Exceeds the limit"),
        ("title: !!timestamp x", "not YAML (a value does not fit its tag)"),
        ("title: a\nquestion: &a [*a]", "An alias (*name) holds itself"),
        (
            "title: a\na: &a [1, 1]\n"
            + "".join(
                f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)}, ' * 9}]\n" for n in range(9)
            ),
            "expected at most 100000 values",
        ),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_gets_one_line(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, text))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.yaml"], "no such file"),
        (["test.yaml", "model.num_layers=0"], "model.num_layers must be at least 1"),
        (["test.yaml", "decoder.depth=3"], "command line: decoder.depth: unknown key"),
        (["test.yaml", "decoder"], "must be key=value"),
        (["test.yaml", "--index", "99"], "--index must be 0 to 7, got 99"),
        (["test.yaml", "--index", "0", "decoder.depth=3"], "decoder.depth: unknown key"),
    ],
)
def test_the_command_line_exits_with_2_and_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], words: str
) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert main(["run", *arguments, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1


def test_an_argument_that_no_flag_takes_is_told(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "test.yaml", "--dry-run", "--indx=1"])
    assert "unrecognized arguments: --indx=1" in capsys.readouterr().err


def test_the_references_first_token_needs_as_many_text_ids_as_codes(tmp_path: Path) -> None:
    legacy = {"model.losses.first_image_token": "legacy", "layout.left_text_length": 10}
    legacy |= {"evaluation.evaluators": ["reconstruction"]}
    legacy |= {"vqgan.quantizer.num_codes": 64}
    for size, is_legal in ((37, True), (36, False)):
        path = write(tmp_path, changed({"settings": {**legacy, "tokenizer.vocab_size": size}}))
        if is_legal:
            assert load_experiment(path).runs
        else:
            with pytest.raises(ConfigError, match="of 64 codes only 63 are"):
                load_experiment(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_target_is_a_finite_number(tmp_path: Path, value: float) -> None:
    path = write(tmp_path, GOOD | {"targets": {"vqgan/psnr/test": value}})
    with pytest.raises(ConfigError, match=r"targets\.vqgan/psnr/test: must be a finite number"):
        load_experiment(path)
