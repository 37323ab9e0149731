"""Model families: their registry, the tagged section, capabilities, and runs of a VQ-GAN alone."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from tiny_run import run_tiny

from rudolph.cli import main
from rudolph.config.experiment_file import load_experiment
from rudolph.config.run import RunConfig, resolve_run
from rudolph.evaluation.report_card import NEEDS
from rudolph.families.interface import CAPABILITIES, PARTS, Capabilities
from rudolph.families.registry import FAMILIES, ModelConfig, family_of
from rudolph.files.settings import ConfigError
from rudolph.models.weights import read_weights
from rudolph.runs.resolve import find_folder, open_run

FILE = Path("x.yaml")
# Settings that a family needs besides its defaults.
TEXTS = {"data.tasks": {"text_question_answering": 1.0}}
IMAGES = {"data.tasks": {"image_captioning": 1.0}}
WORDS = {"model.language_model.vocab_size": 16385}
OF_FAMILY = {
    "language_model": {"model.vocab_size": 16385, **TEXTS},
    "flamingo": {**WORDS, **IMAGES},
    "llava": {**WORDS, **IMAGES},
    "late_fusion": IMAGES,
}
SMALL = {"vqgan.resolution": 32, "vqgan.channels": [32, 32], "vqgan.quantizer.num_codes": 8}


def test_each_family_has_its_section_and_needs_known_parts() -> None:
    tags = [get_args(get_type_hints(section)["family"])[0] for section in get_args(ModelConfig)]
    assert tags == list(FAMILIES)
    for section, (name, family) in zip(get_args(ModelConfig), FAMILIES.items(), strict=True):
        assert family.config is section
        assert set(family.needs(section(family=name))) <= set(PARTS)
        assert family.capabilities.provided()
    assert Capabilities.provided() == ()
    for name in CAPABILITIES:
        arguments = {"generate_image": ([""],), "generate_text": ("",), "embed_image": (None,)}
        arguments |= {"loglikelihood": ("", []), "embed_text": ([],)}
        arguments |= {"generate_text_after_shots": ("", [])}
        arguments |= {"loglikelihood_after_shots": ("", [], []), "count_operations": ("", [])}
        keywords = {} if not name.startswith("generate") else {"config": None, "seeds": []}
        with pytest.raises(NotImplementedError):
            getattr(Capabilities(), name)(*arguments.get(name, ()), **keywords)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_builds_on_the_meta_device(name: str) -> None:
    config = resolve_run(FILE, {"model.family": name, **SMALL, **OF_FAMILY.get(name, {})})
    with torch.device("meta"):
        model = family_of(config.model).empty(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_evaluator_is_refused_where_the_family_lacks_what_it_needs() -> None:
    refused = 0
    for name, family in FAMILIES.items():
        for evaluator, needs in NEEDS.items():
            lacking = set(needs) - set(family.capabilities.provided())
            if lacking:
                settings = {"model.family": name, **SMALL, **OF_FAMILY.get(name, {})}
                settings |= {"evaluation.evaluators": [evaluator]}
                with pytest.raises(
                    ConfigError, match=rf"{evaluator} needs a model with|needs (a )?d"
                ):
                    resolve_run(FILE, settings)
                refused += 1
    assert refused > 20


def test_a_misspelt_family_and_a_setting_of_another_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.family: must be one of .*did you mean clip\?"):
        resolve_run(FILE, {"model.family": "clib"})
    with pytest.raises(ConfigError, match=r"model\.num_layers: unknown key; legal are family"):
        resolve_run(FILE, {"model.family": "clip", "model.num_layers": 2})
    with pytest.raises(ValueError, match=r"model\.family: expected rudolph, got clip"):
        assert RunConfig(model=FAMILIES["clip"].config()).decoder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_override", [False, True])
def test_an_unknown_key_is_answered_with_the_keys_of_its_family(
    tmp_path: Path, family: str, is_override: bool
) -> None:
    settings = {"model": {"family": family}} if family != "rudolph" else {}
    wrong = {} if is_override else {"variants": {"a": {"model.initt": None}}}
    content = {"title": "t", "question": "q", "settings": settings, **wrong}
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps(content))
    names = ", ".join(field.name for field in fields(FAMILIES[family].config))
    with pytest.raises(ConfigError) as caught:
        load_experiment(file, ["model.initt=null"] if is_override else [])
    message = f"model.initt: unknown key; legal are {names}; did you mean model.init?"
    assert str(caught.value).endswith(message)


def test_a_vqgan_alone_is_the_part_that_a_decoder_trains(finished: Path, tmp_path: Path) -> None:
    folder = run_tiny(tmp_path, ("model.family=vqgan", "evaluation.evaluators=[reconstruction]"))
    alone, part = (
        read_weights(run / "checkpoints" / "vqgan.safetensors") for run in (folder, finished)
    )
    assert alone.keys() == part.keys()
    assert all(torch.equal(alone[name], part[name]) for name in alone)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (folder, finished)]
    own = summaries[0]["metrics"]
    assert own and own.items() <= summaries[1]["metrics"].items()
    assert not list((folder / "checkpoints").glob("*.model"))
    model, config = open_run(folder)
    assert model.image_tokenizer().num_codes == config.vqgan.quantizer.num_codes


def test_an_experiment_names_its_run(finished: Path, tmp_path: Path) -> None:
    # Other tests leave runs next to the finished one.
    folder = shutil.copytree(finished, tmp_path / "tiny" / finished.name)
    source = {"runs": tmp_path, "uri": ""}
    run = finished.name.rpartition("-")[0]
    assert find_folder("experiment:tiny", **source) == folder
    assert find_folder(f"experiment:tiny:{run}", **source) == folder
    with pytest.raises(ValueError, match=rf"no finished run in .*, only {run}\. Train it"):
        find_folder("experiment:tiny:seed9", **source)
    with pytest.raises(ValueError, match=r"Train it with `rudolph run experiments/other\.yaml`"):
        find_folder("experiment:other", **source)
    with pytest.raises(ValueError, match=r"; did you mean tiny\?$"):
        find_folder("experiment:tyny", **source)
    with pytest.raises(ValueError, match=r"^tiny: .*; did you mean experiment:tiny\?$"):
        find_folder("tiny", **source)


@pytest.mark.parametrize(
    "name", ["quickstart", "hyper_tasking/shapes_clip", "fusion/flamingo_shapes"]
)
def test_show_counts_the_parameters_of_every_family(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[1] / "experiments" / f"{name}.yaml"
    assert main(["show", str(path)]) == 0
    config = load_experiment(path).runs[0].config
    with torch.device("meta"):
        model = family_of(config.model).empty(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters" in capsys.readouterr().out
