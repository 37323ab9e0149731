"""A run that starts from trained weights: another run, an MLflow run or a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import quiet, run_tiny, write

from rudolph.cli import main
from rudolph.config.experiment_file import load_experiment
from rudolph.families.registry import family_of
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.runs.execution import Execution, Folders, Hardware, NullRecorder
from rudolph.runs.resolve import find_folder, find_tokenizer, load_run, open_weights
from rudolph.runs.stages.model import start_from
from rudolph.runs.stages.origins import warn_of_other_parts
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.tracking.tracker import send_pending


def from_run(finished: Path) -> tuple[str, ...]:
    return (
        f"model.init={finished}",
        f"vqgan.init={finished}",
        f"tokenizer.path={finished}",
        "optim.ema_decay=null",
    )


def decoder_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "decoder.safetensors")


def test_frozen_parts_of_the_weights_come_through_a_run(finished: Path, tmp_path: Path) -> None:
    settings = ("model.tuning.frozen=[attention, mlp(0-0)]", "layout.right_text_length=12")
    folder = run_tiny(tmp_path, (*from_run(finished), *settings), activation_checkpointing=True)
    old, new = decoder_of(finished), decoder_of(folder)
    assert old.keys() == new.keys()
    still = {name for name in old if old[name].equal(new[name])}
    assert still == {
        name for name in old if "to_qkv" in name or "to_out" in name or "layers.0.mlp_in." in name
    } | {name for name in old if "layers.0.mlp_out." in name}
    assert new["right_position.weight"].shape[0] == 13
    vqgans = [load_file(each / "checkpoints" / "vqgan.safetensors") for each in (finished, folder)]
    assert all(vqgans[0][name].equal(value) for name, value in vqgans[1].items())
    bpe = [(each / "checkpoints" / "bpe.model").read_bytes() for each in (finished, folder)]
    assert bpe[0] == bpe[1]


def test_a_low_rank_run_leaves_ordinary_weights_that_differ_by_low_rank(
    finished: Path, tmp_path: Path
) -> None:
    settings = ("model.tuning.frozen=[all]", "model.tuning.lora_rank=2")
    folder = run_tiny(tmp_path, (*from_run(finished), *settings))
    old, new = decoder_of(finished), decoder_of(folder)
    assert old.keys() == new.keys()
    moved = {name for name in old if not old[name].equal(new[name])}
    assert moved == {name for name in old if name.endswith(("to_qkv.weight", "to_out.weight"))}
    for name in moved:
        update = (new[name] - old[name]).double()
        assert torch.linalg.matrix_rank(update, rtol=1e-4) <= 2
    pipeline, _ = load_run(folder)
    assert all(torch.isfinite(value).all() for value in pipeline.decoder.state_dict().values())


def test_what_changed_on_the_way_is_said_in_one_line(finished: Path, tmp_path: Path) -> None:
    settings = ("layout.left_text_length=30", "tokenizer.num_specials=20")
    experiment = load_experiment(write(tmp_path), (*from_run(finished), *settings))
    notes: list[str] = []
    execution = Execution(
        experiment.runs[0],
        tmp_path,
        Folders(tmp_path, tmp_path / "runs"),
        Hardware(),
        NullRecorder(),
        lambda stage, done, total, note: notes.append(note),
    )
    config = experiment.runs[0].config
    model = MaskedDecoder(config.decoder.architecture, config.sequence_layout, config.vocabulary)
    start_from(execution, family_of(config.model), model)
    assert len(notes) == 1 and "\n" not in notes[0]
    assert "left text 20 -> 30: positions interpolated" in notes[0]
    assert "text specials 17 -> 20: new rows start at random" in notes[0]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.num_layers=3", "model.num_layers must be 2"),
        ("vqgan.z_channels=6", "vqgan.z_channels: expected 4"),
        ("vqgan.quantizer.num_codes=13", "vqgan.quantizer.num_codes: expected 12"),
        ("model.tuning.frozen=[mlp(0-2)]", "expected layers 0 to 1"),
        ("model.init=nowhere/run", "nowhere/run: no such folder"),
        ("model.init=RUDOLPH-350N", "did you mean RUDOLPH-350M"),
        ("tokenizer.path=nothing.model", "nothing.model: no such tokenizer file"),
        ("optim.optimizer=adamw8bit", "adamw8bit: expected"),
    ],
)
def test_weights_that_do_not_fit_are_told_in_one_line(
    finished: Path, tmp_path: Path, monkeypatch, capsys, setting: str, words: str
) -> None:
    if "8bit" in setting and torch.cuda.is_available():
        pytest.skip("this machine may have bitsandbytes")
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    assert main(["run", "tiny.yaml", *from_run(finished), setting]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error


def parts_of(folder: Path) -> tuple[bytes, dict[str, torch.Tensor]]:
    checkpoints = folder / "checkpoints"
    return (checkpoints / "bpe.model").read_bytes(), load_file(checkpoints / "vqgan.safetensors")


def test_tokenizer_and_vqgan_are_those_of_the_weights(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The data differs, so training would have produced other ones."""
    settings = ("optim.ema_decay=null", "data.shapes.seed=5", "seed=5")
    folder = run_tiny(tmp_path, (f"model.init={finished}", *settings))
    (bpe, vqgan), (own_bpe, own_vqgan) = parts_of(finished), parts_of(folder)
    assert bpe == own_bpe and all(value.equal(own_vqgan[name]) for name, value in vqgan.items())
    assert not list(tmp_path.glob("runs/.cache/vqgan-*"))
    assert not list(tmp_path.glob("runs/.cache/tokenizer-*"))
    assert "differs from" not in caplog.text
    # Naming all three sources gives the same run.
    path = write(tmp_path)
    first, second = (
        load_experiment(path, given).runs[0].config
        for given in ((f"model.init={finished}", settings[0]), from_run(finished))
    )
    assert first == second and first.digest == second.digest
    assert first.trainings.keys() == {"optim"}


def execution_of(folder: Path, settings: tuple[str, ...]) -> Execution:
    run = load_experiment(write(folder), settings).runs[0]
    folders = Folders(folder, folder / "runs")
    return Execution(run, folder, folders, Hardware(), NullRecorder(), quiet)


def test_a_named_tokenizer_or_vqgan_that_differs_is_warned_of(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, _ = load_run(finished)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    vqgan = copy / "checkpoints" / "vqgan.safetensors"
    packed = {name: value.half() for name, value in load_file(vqgan).items()}
    save_file(packed, vqgan)
    named = (f"model.init={finished}", f"tokenizer.path={copy}", f"vqgan.init={copy}")
    warn_of_other_parts(execution_of(tmp_path, named), pipeline.tokenizer, load_run(copy)[0].vqgan)
    assert caplog.text == "", "a packed copy has the same parts"
    words = [f"слово{number}" for number in range(40)]
    other = Tokenizer.train(words, vocab_size=60, path=tmp_path / "other.model")
    for parameter in pipeline.vqgan.parameters():
        parameter.data.add_(0.1)
    warn_of_other_parts(execution_of(tmp_path, named), other, pipeline.vqgan)
    lines = [record.message for record in caplog.records]
    assert lines == [
        f"tokenizer.path: {copy} differs from the tokenizer of model.init {finished}",
        f"vqgan.init: {copy} differs from the VQ-GAN of model.init {finished}",
    ]


def test_show_tells_what_is_trained_and_the_memory(
    finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    said = []
    for settings in ((), ("model.tuning.frozen=[embeddings, head]",)):
        assert main(["show", "tiny.yaml", *settings]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if line[:1] == "#"])
    total = sum(value.numel() for value in load_run(finished)[0].decoder.parameters())
    assert f"{total:,} of {total:,} parameters are trained" in said[0][1]
    assert f"of {total:,} parameters" in said[1][1] and said[0][1] != said[1][1]
    assert "memory at 4 examples per device" in said[0][2]


def test_an_mlflow_run_is_a_source_here_and_elsewhere(finished: Path, tmp_path: Path) -> None:
    import mlflow

    root = finished.parent.parent.parent
    uri = f"sqlite:///{root}/mlflow.db"
    send_pending(root / "runs", uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    digest = json.loads((finished / "summary.json").read_text())["digest"]
    run = client.search_runs([experiment.experiment_id], f"tags.digest = '{digest}'")[0]
    run_id = run.info.run_id
    assert find_folder(run_id, runs=root / "runs", uri=uri) == finished
    places = {"runs": tmp_path / "runs", "uri": uri}
    fetched = find_folder(run_id, **places)
    assert fetched.is_relative_to(tmp_path)
    model = open_weights(run_id, MaskedDecoder, **places).state_dict()
    assert all(value.equal(model[name]) for name, value in decoder_of(finished).items())
    assert find_tokenizer(run_id, **places).is_file()
    with pytest.raises(
        ValueError, match=rf"MLflow run {'0' * 32}: checkpoints cannot be downloaded"
    ):
        find_folder("0" * 32, **places)
