"""Damaged weight folders are refused in one line that names the file and the remedy."""

import shutil
from pathlib import Path
from random import Random

import pytest
from damage import NUM_CASES, damage, files_of
from tiny_weights import write_all

from rudolph.checkpoints import store
from rudolph.files.atomic import explain_os_error
from rudolph.runs.resolve import fetched_run, open_clip, open_model, open_upscaler, open_vqgan

OPENED = {
    "rudolph": open_model,
    "rudalle_v2": open_model,
    "clip": open_clip,
    "x2": open_upscaler,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("home"))


def open_folder(name: str, folder: Path) -> object:
    if OPENED[name] is open_model:
        return open_model(str(folder), runs=folder, uri="")
    return OPENED[name](str(folder))


def test_any_damage_to_a_folder_of_weights_is_refused_in_one_line_or_harmless(
    home: Path, tmp_path: Path
) -> None:
    for case in range(NUM_CASES or 12):
        rng = Random(case)
        name = rng.choice(sorted(OPENED))
        folder = tmp_path / str(case)
        shutil.copytree(home / name, folder)
        what = damage(rng.choice(files_of(folder)), rng, others=files_of(home))
        try:
            open_folder(name, folder)
        except (ValueError, OSError) as error:
            line = explain_os_error(error) if isinstance(error, OSError) else str(error)
            # A missing tokenizer or VQ-GAN is searched among the released ones.
            is_elsewhere = "is not on this disk; `rudolph pull" in line
            assert "\n" not in line and (str(folder) in line or is_elsewhere), (what, line)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["rudolph", "rudalle_v2"])
def test_a_decoder_brings_the_vqgan_that_it_is_used_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("RUDOLPH_WEIGHTS", str(tmp_path / "released"))
    found = open_vqgan(str(home / name), runs=tmp_path, uri="").state_dict()
    own = store.load_weights(home / name / "vqgan").state_dict()
    assert all(value.equal(found[key]) for key, value in own.items())
    shutil.copytree(home / name, tmp_path / name, ignore=shutil.ignore_patterns("vqgan"))
    with pytest.raises(ValueError, match="Run `rudolph pull Sber-VQGAN`"):
        open_vqgan(str(tmp_path / name), runs=tmp_path, uri="")


def test_a_damaged_release_says_how_to_get_it_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUDOLPH_WEIGHTS", str(tmp_path))
    folder = tmp_path / "RealESRGAN-x2"
    shutil.copytree(home / "x2", folder)
    assert open_upscaler("realesrgan-X2")
    weights = folder / store.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"weights\.safetensors: .*`rudolph pull RealESRGAN-x2`"):
        open_upscaler("RealESRGAN-x2")
    (folder / store.WEIGHTS_CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: .*`rudolph pull RealESRGAN-x2`"):
        open_upscaler("RealESRGAN-x2")


def test_a_damaged_run_in_the_cache_is_fetched_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "mlflow-0"
    calls = []

    def fetch(run_id: str, uri: str, folder: Path) -> Path:
        if not folder.is_dir():
            calls.append(run_id)
            shutil.copytree(finished / "checkpoints", folder / "checkpoints")
            shutil.copyfile(finished / "config.yaml", folder / "config.yaml")
        return folder

    monkeypatch.setattr("rudolph.runs.resolve.fetch_run", fetch)
    assert fetched_run("0", "uri", cached) == fetched_run("0", "uri", cached) == cached
    assert calls == ["0"]
    (cached / "checkpoints" / "vqgan.safetensors").write_bytes(b"")
    fetched_run("0", "uri", cached)
    (cached / "config.yaml").write_text("seed: [")
    fetched_run("0", "uri", cached)
    assert calls == ["0"] * 3
    aside = {"mlflow-0", "mlflow-0.damaged", "mlflow-0.damaged-2"}
    assert {path.name for path in tmp_path.iterdir()} == aside
