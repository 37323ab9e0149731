"""Releases pulled from a hub, converted, loaded in little memory, and converted back."""

import io
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_released import CONFIG, HEAD, assert_same, complaint, convert, weights_like

from rudolph.checkpoints import store
from rudolph.checkpoints.releases import IMAGE_TOKENIZER, RELEASED, TOKENIZER, Release
from rudolph.cli import main
from rudolph.models.reference import from_reference, to_reference
from rudolph.models.reference.family import StoredMaskWarning
from rudolph.runs.resolve import load_run, open_clip, open_model
from rudolph.sequence.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
REPOSITORY = "ai/small"
VQGAN: dict[str, Any] = {
    "dwt": False,
    "model": {
        "params": {
            "ddconfig": {
                "double_z": False,
                "z_channels": 4,
                "resolution": 16,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 1, 1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "embed_dim": 4,
            "n_embed": 11,
            "kl_weight": 1e-8,
        }
    },
}
CLIP = {
    "embed_dim": 8,
    "image_resolution": 6,
    "vision_layers": 1,
    "vision_width": 64,
    "vision_patch_size": 3,
    "context_length": 7,
    "vocab_size": 30,
    "transformer_width": 8,
    "transformer_heads": 2,
    "transformer_layers": 1,
}
SMALL = {
    "RUDOLPH-350M": ("rudolph", CONFIG),
    IMAGE_TOKENIZER: ("vqgan", VQGAN),
    "Kandinsky": ("rudolph", CONFIG),
    "ruclip-vit-base-patch32-224": ("ruclip", CLIP),
    TOKENIZER: ("tokenizer", {}),
}


def content_of(name: str, folder: Path) -> bytes:
    """Return a small release as the file that the reference's authors would upload."""
    family, config = SMALL[name]
    if family == "tokenizer":
        return tokenizer(folder).read_bytes()
    file = io.BytesIO()
    weights = weights_like(family, config)
    # Sber's file is a training checkpoint that includes the discriminator.
    loss = {"loss.discriminator.main.0.weight": torch.ones(3)} if family == "vqgan" else {}
    torch.save({"state_dict": weights | loss} if loss else weights, file)
    return file.getvalue()


def tokenizer(folder: Path) -> Path:
    """Return the file of a small BPE model."""
    words = ["красный круг", "синий крест", "круг"]
    return Tokenizer.train(words, vocab_size=30, path=folder / "made" / "bpe.model").path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Yield a hub with small models under released names, and a folder for pulled files."""
    monkeypatch.setenv("RUDOLPH_WEIGHTS", str(tmp_path / "home"))
    with HubServer() as server:
        server.stand_in(monkeypatch, home=tmp_path / "user")
        for name, (family, config) in SMALL.items():
            known = RELEASED[name]
            repository = f"{REPOSITORY}-{family}" + ("-gated" if known.is_gated else "")
            small = Release(
                family,
                repository,
                known.file,
                megabytes=1,
                config=config,
                needs=known.needs,
                companions=known.companions,
                is_gated=known.is_gated,
            )
            monkeypatch.setitem(RELEASED, name, small)
            content = content_of(name, tmp_path)
            server.add(repository, known.file, content, is_large=family != "tokenizer")
            for companion in known.companions:
                server.add(repository, companion, tokenizer(tmp_path).read_bytes())
            if known.is_gated:
                server.gate(repository, token="hf_good")
        yield server


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_pulled_model_brings_what_it_needs_and_draws_a_image(
    hub: HubServer, tmp_path: Path, capsys
) -> None:
    assert main(["pull", "rudolph-350m"]) == 0
    home = tmp_path / "home"
    assert files_in(home) == {"RUDOLPH-350M", IMAGE_TOKENIZER, TOKENIZER}
    for name in ("RUDOLPH-350M", IMAGE_TOKENIZER):
        assert files_in(home / name) == {"weights.safetensors", "config.json"}
        family, config = SMALL[name]
        assert_same(load_file(home / name / "weights.safetensors"), weights_like(family, config))
        about = json.loads((home / name / "config.json").read_text())
        assert (about["family"], about["config"]) == (family, config)
        repository = f"{REPOSITORY}-{family}"
        assert about["origin"]["commit"] == hub.commits[repository]
        assert about["origin"]["sha256"] == hub.files[repository, RELEASED[name].file].hash
    assert files_in(home / TOKENIZER) == {"bpe.model"}
    source = open_model("RUDOLPH-350M", runs=tmp_path, uri="")
    decoder = from_reference("rudolph", CONFIG, weights_like("rudolph", CONFIG)).eval()
    tokens = torch.arange(18)[None] % 9
    assert torch.equal(source.pipeline.decoder(tokens), decoder(tokens))
    assert source.image_size == 3 * 8 and source.name == "RUDOLPH-350M"
    assert len(capsys.readouterr().err.splitlines()) > 0


def test_what_is_here_is_not_asked_for_again(hub: HubServer, tmp_path: Path, capsys) -> None:
    assert main(["pull", "RUDOLPH-350M"]) == 0
    hub.requests.clear()
    capsys.readouterr()
    assert main(["pull", "RUDOLPH-350M", "Sber-VQGAN"]) == 0
    assert hub.requests == []
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"{name}: already on disk" for name in (IMAGE_TOKENIZER, TOKENIZER, "RUDOLPH-350M")
    ]
    (tmp_path / "home" / IMAGE_TOKENIZER / "weights.safetensors").unlink()
    assert main(["pull", "RUDOLPH-350M"]) == 0
    assert len(hub.content_requests()) == 1
    assert store.is_pulled(IMAGE_TOKENIZER)


def test_a_clip_is_pulled_with_its_own_tokenizer(hub: HubServer, tmp_path: Path) -> None:
    name = "ruclip-vit-base-patch32-224"
    assert main(["pull", name]) == 0
    folder = tmp_path / "home" / name
    assert files_in(folder) == {"weights.safetensors", "config.json", "bpe.model"}
    assert open_clip(name).clip.config.vocab_size == 30


def test_a_file_at_hand_needs_no_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.status = 500
    name = "ruclip-vit-base-patch32-224"
    shelf = tmp_path / "made"
    for wanted in (name, TOKENIZER, "Kandinsky"):
        path = shelf / RELEASED[wanted].file
        path.write_bytes(content_of(wanted, tmp_path))
        assert main(["pull", wanted, "--file", str(path)]) == 0
        assert store.is_pulled(wanted) and path.is_file()
    assert open_clip(name).clip.config.vocab_size == 30
    about = json.loads((tmp_path / "home" / name / "config.json").read_text())
    assert "sha256" not in about["origin"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Kandinsky"], "ai/small-rudolph-gated is gated: request access at https://hu"),
        (
            ["RUDOLPH-350"],
            "RUDOLPH-350: no released model has this name; did you mean RUDOLPH-350M",
        ),
        (["malevitch"], "did you mean Malevich"),
        (["RUDOLPH-350M", "nothing-like-it"], "nothing-like-it: no released model has this name"),
        (["Kandinsky", "--file", "nowhere.bin"], "nowhere.bin: no such file"),
        (["Kandinsky", "--file", "."], ".: no such file"),
        (["Kandinsky", "Malevich", "--file", "x"], "--file: expected one name with it, got 2"),
        (["Kandinsky", "--file", "vqgan.bin"], "rudolph: the reference has no tensor model."),
        (
            [IMAGE_TOKENIZER, "--file", "rudolph.bin"],
            "vqgan: the file lacks model.encoder.conv_in",
        ),
        (
            ["ruclip-vit-base-patch32-224", "--file", "rudolph.bin"],
            "ruclip: the file lacks positional_emb",
        ),
        ([TOKENIZER, "--file", "rudolph.bin"], "rudolph.bin: not a YouTokenToMe model file"),
    ],
)
def test_a_pull_that_cannot_be_is_told_in_one_line(
    hub: HubServer, tmp_path: Path, monkeypatch, capsys, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in ((IMAGE_TOKENIZER, "vqgan.bin"), ("RUDOLPH-350M", "rudolph.bin")):
        Path(file).write_bytes(content_of(name, tmp_path))
    tokenizer(tmp_path).rename("bpe.model")
    assert main(["pull", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()
    assert words in told[-1] and not any("Traceback" in line for line in told)
    assert not any(store.is_pulled(name) for name in SMALL if name in arguments)
    if "gated" not in words:
        assert len(told) == 1 and hub.content_requests() == []


def test_a_gated_model_comes_with_the_token_of_its_page(hub: HubServer, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert main(["pull", "Kandinsky"]) == 0
    assert store.is_pulled("Kandinsky")


def test_bytes_that_arrive_wrong_are_no_model(hub: HubServer, capsys) -> None:
    hub.is_corrupt = True
    assert main(["pull", IMAGE_TOKENIZER]) == 2
    assert "expected the hash" in capsys.readouterr().err
    assert not store.is_pulled(IMAGE_TOKENIZER)
    hub.is_corrupt = False
    assert main(["pull", IMAGE_TOKENIZER]) == 0
    assert store.is_pulled(IMAGE_TOKENIZER)


def test_a_pull_that_was_interrupted_while_it_converted_downloads_nothing_again(
    hub: HubServer, tmp_path: Path, monkeypatch, capsys
) -> None:
    def interrupt(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", interrupt)
        assert main(["pull", IMAGE_TOKENIZER]) == 130
    assert not store.is_pulled(IMAGE_TOKENIZER)
    assert "Run the same command again to resume" in capsys.readouterr().err
    num_requests = len(hub.content_requests())
    assert main(["pull", IMAGE_TOKENIZER]) == 0
    assert store.is_pulled(IMAGE_TOKENIZER) and len(hub.content_requests()) == num_requests == 1
    assert files_in(tmp_path / "home" / IMAGE_TOKENIZER) == {"weights.safetensors", "config.json"}


def test_models_are_listed_with_what_is_here(hub: HubServer, tmp_path: Path, capsys) -> None:
    assert main(["pull", TOKENIZER]) == 0
    capsys.readouterr()
    assert main(["models"]) == 0
    printed = capsys.readouterr()
    head, *rows = printed.out.splitlines()
    assert [row.split()[0] for row in rows] == list(RELEASED)
    at = head.index("on disk")
    states = {row.split()[0]: row[at:].split()[0] for row in rows}
    assert {name for name, state in states.items() if state == "yes"} == {TOKENIZER}
    assert {name for name, state in states.items() if state == "gated"} == {"Kandinsky"}
    assert str(tmp_path / "home") in printed.err


def test_tensors_that_share_memory_or_lie_apart_are_written_once_each(tmp_path: Path) -> None:
    weights = weights_like("rudolph", CONFIG)
    head, table = weights[HEAD], weights["transformer.row_mask"]
    changes = {
        HEAD: head.t().contiguous().t(),  # the same numbers, column by column
        "transformer.final_layernorm.weight": head[3],
        "transformer.final_layernorm.bias": head.flatten()[7:19],
        "transformer.col_mask": table,
    }
    shared = weights | changes
    path = tmp_path / "w.bin"
    torch.save(shared, path)
    with pytest.warns(StoredMaskWarning, match="col_mask"):
        assert_same(convert(path), shared)
    equal_kernels = CONFIG | {"num_layers": 8, "last_kernel_size": CONFIG["kernel_size"]}
    model = from_reference("rudolph", equal_kernels, weights_like("rudolph", equal_kernels))
    store.write_checkpoint(
        tmp_path / "equal", to_reference(model).state_dict, family="rudolph", config={}
    )
    assert_same(load_file(tmp_path / "equal" / store.WEIGHTS_FILE), to_reference(model).state_dict)


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.save(weights_like("rudolph", CONFIG), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        words = complaint(convert, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = tmp_path / "converted"
    assert words.startswith(f"{folder}: cannot write weights.safetensors: ")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("has_older", [False, True])
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_an_interrupted_conversion_is_whole_or_has_no_config(
    tmp_path: Path, monkeypatch, has_older: bool, moment: int
) -> None:
    path, folder = tmp_path / "w.bin", tmp_path / "converted"
    if has_older:
        torch.save(weights_like("rudolph", CONFIG, seed=1), path)
        older = convert(path)
    torch.save(weights_like("rudolph", CONFIG), path)
    calls: list[Any] = []

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any) -> Any:
            calls.append(given)
            if len(calls) > moment:
                raise KeyboardInterrupt
            return call(*given)

        return wrapper

    monkeypatch.setattr(store, "save_file", interrupted(save_file))
    monkeypatch.setattr(os, "replace", interrupted(os.replace))
    with pytest.raises(KeyboardInterrupt):
        convert(path)
    assert not list(folder.glob("*.new"))
    if has_older and moment == 0:
        assert_same(load_file(folder / store.WEIGHTS_FILE), older)
        assert store.read_config(folder) == ("rudolph", CONFIG)
    else:
        assert "config.json is missing" in complaint(store.load_weights, folder)


def test_a_run_is_converted_for_the_references_packages(
    finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(finished), "given", "--pickle"]) == 0
    told = capsys.readouterr().err
    assert "VQGAN: left out (vqgan: the reference cannot express a ema quantizer" in told
    assert files_in(Path("given")) == {
        *("bpe.model", "config.json", "pytorch_model.bin", "weights.safetensors")
    }
    decoder = load_run(finished)[0].decoder.eval()
    again = store.load_weights("given")
    tokens = torch.arange(decoder.layout.length)[None] % 12
    expected = decoder(tokens)
    assert torch.equal(again(tokens), expected)
    pickled = torch.load("given/pytorch_model.bin", weights_only=True)
    assert_same(pickled, load_file("given/weights.safetensors"))
    family, config = store.read_config(Path("given"))
    assert torch.equal(from_reference(family, config, pickled).eval()(tokens), expected)
    assert main(["convert", "given", "again"]) == 0
    assert_same(load_file("again/weights.safetensors"), pickled)
    # A pickle from an earlier call would hold other weights; the user's own pickle stays.
    assert main(["convert", str(finished), "given"]) == 0
    assert "pytorch_model.bin" not in files_in(Path("given"))
    Path("own").mkdir()
    Path("own/pytorch_model.bin").write_text("mine", encoding="utf-8")
    assert main(["convert", str(finished), "own"]) == 0
    assert Path("own/pytorch_model.bin").read_text(encoding="utf-8") == "mine"


def test_a_conversion_into_its_source_is_refused(
    finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(finished)
    before = files_in(finished)
    for target in ("run", str(finished), "run/new", str(finished.parent)):
        assert main(["convert", "run", target]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("rudolph: folder: expected a path apart from run, got ")
    assert files_in(finished) == before


def test_a_file_among_what_was_fetched_is_not_deleted(
    hub: HubServer, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "home" / TOKENIZER / "download" / RELEASED[TOKENIZER].file
    file.parent.mkdir(parents=True)
    file.write_bytes(content_of(TOKENIZER, tmp_path))
    assert main(["pull", TOKENIZER, "--file", str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("rudolph: --file: expected a path apart from ") and file.is_file()
