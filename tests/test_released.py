"""Released files: facts in the table, forbidden file contents, and the cost of loading."""

import argparse
import os
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rudolph.checkpoints import store
from rudolph.checkpoints.releases import RELEASED
from rudolph.models.reference import empty_model, to_reference

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "l_text_seq_length": 5,
    "image_tokens_per_dim": 3,
    "r_text_seq_length": 4,
    "kernel_size": 3,
    "last_kernel_size": 5,
    "vocab_size": 30 + 5,
    "image_vocab_size": 11,
    "text_special_tokens": 2,
    "image_special_tokens": 3,
}
HEAD = "to_logits.1.weight"
# Layers, hidden size, left text, image tokens per side, right text, text and image vocabulary, as
# the reference counts them; then the number of tensors in its file.
DECODERS = {
    "RUDOLPH-350M": (24, 1024, 64, 16, 64, 16832, 8576, 400),
    "RUDOLPH-350M-v1": (24, 1024, 64, 16, 64, 16448, 8192, 400),
    "RUDOLPH-1.3B": (24, 2048, 128, 32, 128, 18560, 8256, 400),
    "RUDOLPH-2.7B": (32, 2560, 384, 24, 128, 17792, 9216, 528),
    "RUDOLPH-2.7B-FBC2": (32, 2560, 384, 24, 128, 17792, 9216, 528),
    "Malevich": (24, 2048, 128, 32, None, 16512, 8192, 398),
    "Malevich-v2": (24, 2048, 128, 32, None, 16512, 8192, 398),
    "Emojich": (24, 2048, 128, 32, None, 16512, 8192, 398),
    "Surrealist-XL": (24, 2048, 128, 32, None, 16512, 8192, 398),
    "Kandinsky": (64, 3840, 128, 32, None, 16512, 8192, 1038),
}
# Parameters and tensors, counted from the references' constructors.
OTHERS = {
    "ruclip-vit-base-patch32-224": (151_277_313, 302),
    "ruclip-vit-base-patch16-224": (149_620_737, 302),
    "ruclip-vit-large-patch14-224": (427_616_513, 446),
    "ruclip-vit-base-patch32-384": (151_350_273, 302),
    "ruclip-vit-large-patch14-336": (427_944_193, 446),
    "ruclip-vit-base-patch16-384": (149_912_577, 302),
    "Sber-VQGAN": (68_995_971, 301),
    "Sber-VQGAN-DWT": (69_072_140, 307),
    "RealESRGAN-x2": (16_703_171, 702),
    "RealESRGAN-x4": (16_697_987, 702),
    "RealESRGAN-x8": (16_734_915, 704),
}


def counted(name: str) -> tuple[int, int]:
    """Return the parameters and tensors of a release, from the reference's closed forms."""
    if name in OTHERS:
        return OTHERS[name]
    layers, hidden, left, side, right, texts, codes, num_tensors = DECODERS[name]
    positions = left + 1 + 2 * side + (0 if right is None else right + 1)
    total = texts + codes
    blocks = layers * (12 * hidden**2 + 17 * hidden) + 4 * hidden
    return blocks + 2 * total * hidden + total + positions * hidden, num_tensors


def weights_like(family: str, config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Return half-precision tensors of a small model under the reference's names."""
    generator = torch.Generator().manual_seed(seed)
    model = empty_model(family, config)
    if hasattr(model, "register_masks"):
        model.register_masks()  # on the CPU, as when a file is loaded
    tensors = to_reference(model).state_dict
    return {
        key: torch.randn(value.shape, generator=generator).half() / 4 if value.is_meta else value
        for key, value in tensors.items()
    }


def complaint(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """Return the one-line message of a refusal."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert text.isprintable() and "weights_only" not in text, text
    return text


def convert(file: Path) -> dict[str, Tensor]:
    """Convert a file and return the resulting weights."""
    folder = file.with_name("converted")
    store.convert_checkpoint(file, folder, family="rudolph", config=CONFIG)
    return load_file(folder / store.WEIGHTS_FILE)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_every_release_is_known_to_the_reference_and_needs_what_is_released() -> None:
    tokenizers = {name for name, release in RELEASED.items() if release.family == "tokenizer"}
    assert set(RELEASED) == {*DECODERS, *OTHERS, *tokenizers}
    assert len({name.lower() for name in RELEASED}) == len(RELEASED)
    files = [(release.repository, release.file) for release in RELEASED.values()]
    assert len(set(files)) == len(files)
    for name, release in RELEASED.items():
        assert set(release.needs) < set(RELEASED) - {name}, name
        assert (len(release.needs) == 2) == (name in DECODERS), name


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_a_released_size_is_built_without_memory_and_has_the_references_counts(name: str) -> None:
    release = RELEASED[name]
    model = empty_model(release.family, release.config)
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])
    if name in DECODERS:
        model.register_masks()
    family, config, tensors = to_reference(model)
    num_parameters = sum(value.numel() for value in model.parameters())
    assert (num_parameters, len(tensors)) == counted(name)
    assert num_parameters == release.num_parameters
    assert family == release.family
    assert {key: config[key] for key in release.config} == release.config
    # Files are in half or single precision; the plain VQ-GAN's file also has its discriminator.
    size = 2 if name in DECODERS else 4
    assert name == "Sber-VQGAN" or release.megabytes * 1e6 == pytest.approx(
        size * num_parameters, rel=0.012
    )


class Bomb:
    """An object whose pickle calls a function on loading."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def hide(bomb: Bomb, place: str, path: Path) -> None:
    """Write a checkpoint that contains a bomb."""
    weights: dict[str, Any] = weights_like("rudolph", CONFIG)
    if place.startswith("bare"):
        path.write_bytes(pickle.dumps({"x": bomb, **weights}, protocol=int(place[-1])))
    elif place == "trainer":
        about = {"epoch": 3, "hyper_parameters": {"lr": bomb}, "callbacks": {ModelCheckpoint: {}}}
        torch.save({"state_dict": weights, **about}, path)
    elif place == "weights":
        torch.save({**weights, HEAD: bomb}, path)
    else:
        torch.save({"x": bomb, **weights}, path, _use_new_zipfile_serialization=place == "zip")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize(
    "place", ["zip", "legacy", "trainer", "weights", *(f"bare{number}" for number in range(6))]
)
def test_code_in_a_checkpoint_is_refused_and_never_run(
    tmp_path: Path, place: str, suffix: str
) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"evil.{suffix}"
    bombs = [Bomb(os.system, f"touch {marker}"), Bomb(exec, f"open({str(marker)!r}, 'w').close()")]
    for bomb in bombs:
        bomb.call(*bomb.arguments)
        assert marker.exists()  # the bomb works
        marker.unlink()
        hide(bomb, place, path)
        words = complaint(convert, path)
        assert words.startswith(f"{path}: ") and not marker.exists()
        # Protocols that torch.save never wrote are refused for that reason.
        is_named = suffix == "bin" and place not in ("bare0", "bare4", "bare5")
        assert (
            not is_named
            or f"refused because it would run {bomb.call.__name__}" in words.replace("posix.", "")
        ), words
        assert not path.with_name("converted").exists()


def fake_package(name: str, folder: Path, marker: Path, monkeypatch: Any) -> types.ModuleType:
    """Write a package that a pickle can name; importing or calling it leaves a marker."""
    package = folder / name
    package.mkdir()
    mark = f"open({str(marker)!r}, 'w').close()\n"
    (package / "__init__.py").write_text(mark)
    module = types.ModuleType(name)
    source = (
        "def call(*given):\n    {0}class Node:\n    def __setstate__(self, state):\n        {0}"
    )
    exec(source.format(mark), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(folder)
    return module


def test_a_trainers_checkpoint_loads_without_its_packages(tmp_path: Path, monkeypatch) -> None:
    marker, path = tmp_path / "marker", tmp_path / "last.ckpt"
    fake = fake_package("omegaconf", tmp_path, marker, monkeypatch)
    node = fake.Node()
    node.content = [1, "x"]
    weights = weights_like("rudolph", CONFIG)
    torch.save(
        {
            "state_dict": {f"model.{key}": value for key, value in weights.items()},
            "callbacks": {ModelCheckpoint: {"best_model_path": tmp_path}},
            "hyper_parameters": argparse.Namespace(lr=0.1, cfg=node, call=Bomb(fake.call, "x")),
            "hparams": AttributeDict(kind=dict, any=Any),
            "loops": {"score": torch.zeros(3).numpy(), "mean": torch.zeros(3).numpy().mean()},
        },
        path,
    )
    content = path.read_bytes()
    assert all(name in content for name in (b"omegaconf", b"argparse", b"numpy", b"PosixPath"))
    torch.load(path, weights_only=False)
    assert marker.exists()  # torch.load runs the code
    marker.unlink()
    for is_imported in (True, False):
        if not is_imported:
            monkeypatch.delitem(sys.modules, "omegaconf")
        found = convert(path)
        assert_same(found, {f"model.{key}": value for key, value in weights.items()})
        assert not marker.exists()
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_every_format_converts_to_the_same_bits(tmp_path: Path, layout: str) -> None:
    weights = weights_like("rudolph", CONFIG)
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.bin")
    write_as(layout, weights, path)
    assert_same(convert(path), weights)


def write_as(layout: str, weights: dict[str, Tensor], path: Path) -> None:
    if layout == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=layout == "zip")


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_off_says_so(tmp_path: Path, layout: str) -> None:
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.bin")
    write_as(layout, weights_like("rudolph", CONFIG), path)
    content = path.read_bytes()
    for length in (0, 1, 3, 4, 9, 100, 2000, len(content) // 2, len(content) - 30, -1):
        path.write_bytes(content[:length])
        words = complaint(convert, path)
        assert words.startswith(f"{path}: not a ") and not path.with_name("converted").exists()


@pytest.mark.parametrize("content", [None, "", "a text\nof two lines", "PK\3\4 no zip", "{}"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_what_is_no_checkpoint_says_so(tmp_path: Path, content: str | None, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    assert complaint(convert, path) == f"{path}: no such file"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    words = complaint(convert, path)
    assert words.startswith((f"{path}: no such file", f"{path}: not a "))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["zip", "legacy", "safetensors"]), st.data())
def test_a_damaged_file_is_refused_in_one_line_or_is_a_model(
    tmp_path: Path, layout: str, data: Any
) -> None:
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.bin")
    write_as(layout, weights_like("rudolph", CONFIG), path)
    content = bytearray(path.read_bytes())
    ends = st.integers(0, 4000) | st.integers(len(content) - 4000, len(content) - 1)
    for place in data.draw(st.lists(ends, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings(action="ignore"):
        try:
            convert(path)
        except ValueError as error:
            assert "\n" not in str(error), str(error)


def spoiled(weights: dict[Any, Any], how: str) -> Any:
    """Return a checkpoint's content with one error."""
    head = weights[HEAD]
    changes: dict[str, Any] = {
        "short": head[:-1],
        "integers": head.int(),
        "sparse": head.to_sparse(),
        "meta": head.to("meta"),
        "quantized": torch.quantize_per_tensor(head.float(), 0.1, 0, torch.qint8),
        "list": [1.0],
    }
    if how in changes:
        return weights | {HEAD: changes[how]}
    if how == "no_head":
        return {key: value for key, value in weights.items() if key != HEAD}
    return {
        "number": weights | {7: head},
        "lines": weights | {"two\nlines": head},
        "mask": weights | {"transformer.row_mask": [1]},
        "nested": {"model": weights},
        "empty": {},
        "other": [weights],
    }[how]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("short", f"rudolph: {HEAD} must be (51, 12), got (50, 12)"),
        ("integers", f"{HEAD} must hold floating-point numbers, got torch.int32"),
        ("sparse", f"{HEAD} must be a dense tensor"),
        ("meta", f"{HEAD} must be a dense tensor"),
        ("quantized", f"{HEAD} must hold floating-point numbers"),
        ("list", f"{HEAD} must be a tensor, got list"),
        ("no_head", f"rudolph: the file lacks {HEAD}"),
        ("number", "expected a name for every tensor, got 7"),
        ("lines", "expected a name for every tensor, got 'two\\nlines'"),
        ("mask", "row_mask must be a tensor, got list"),
        ("nested", "model must be a tensor, got dict"),
        ("empty", "the file lacks text_embeddings.weight"),
        ("other", "expected tensors by name, got list"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantiz:UserWarning")
def test_content_that_does_not_fit_is_named(tmp_path: Path, how: str, words: str) -> None:
    path = tmp_path / "w.bin"
    torch.save(spoiled(weights_like("rudolph", CONFIG), how), path)
    assert words in complaint(convert, path)
    assert not path.with_name("converted").exists()
