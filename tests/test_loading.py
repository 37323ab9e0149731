"""Loading of weights: folders without a model, peak memory, and 8-bit weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pull import CLIP, VQGAN
from test_released import CONFIG, complaint, weights_like
from torch import nn

from rudolph.checkpoints import store
from rudolph.models.cpu.int8 import Int8Linear, to_int8
from rudolph.models.reference import to_reference

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "not a folder of weights, config.json is missing"),
        ("", "expected the keys family and config"),
        ("{", "expected the keys family and config"),
        ("[1]", "expected the keys family and config"),
        ('{"family": "rudolph"}', "expected the keys family and config"),
        (
            '{"family": ["rudolph"], "config": {}}',
            "expected a name as family and a mapping as config",
        ),
        (
            '{"family": "rudolph", "config": 3}',
            "expected a name as family and a mapping as config",
        ),
        ('{"family": "gpt", "config": {}}', "family must be one of rudolph, rudalle, vqgan"),
        ('{"family": "rudolph", "config": {}}', "rudolph: the config lacks l_text_seq_length"),
        ({"num_layers": "4"}, "config.json: not a rudolph model ("),
        ({"vocab_size": -40}, "config.json: not a rudolph model (Trying"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_heads (5), got 12"),
        ({"hidden_size": 15}, "image_col_embeddings.weight must be (3, 15), got (3, 12)"),
        ({}, "weights.safetensors: no such file"),
    ],
)
def test_a_folder_that_holds_no_model_says_why(tmp_path: Path, config: Any, words: str) -> None:
    folder = tmp_path / "folder"
    weights = weights_like("rudolph", CONFIG)
    store.write_checkpoint(folder, weights, family="rudolph", config=CONFIG)
    if isinstance(config, dict):
        content = {"family": "rudolph", "config": CONFIG | config}
        (folder / "config.json").write_text(json.dumps(content))
    else:
        (folder / "config.json").write_text(config or "")
    if config is None:
        (folder / "config.json").unlink()
    if config == {}:
        (folder / "weights.safetensors").unlink()
    assert words in complaint(store.load_weights, folder)


RUDALLE = {
    "num_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "text_seq_length": 4,
    "image_tokens_per_dim": 3,
    "vocab_size": 20 + 4,
    "image_vocab_size": 7,
    "hf_version": "v2",
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("rudolph", CONFIG),
        ("rudalle", RUDALLE),
        ("vqgan", VQGAN),
        ("vqgan", VQGAN | {"dwt": True}),
        ("ruclip", CLIP),
        ("realesrgan", {"scale": 8, "num_feat": 4, "num_block": 1, "num_grow_ch": 2}),
    ],
)
def test_every_family_loads_whole_and_in_any_precision(
    tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    weights = weights_like(family, config)
    store.write_checkpoint(tmp_path, weights, family=family, config=config)
    for dtype in (None, torch.float32):
        model = store.load_weights(tmp_path, dtype=dtype)
        assert not model.training
        assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
        assert {value.dtype for value in model.parameters()} == {dtype or torch.half}
        for key, value in to_reference(model).state_dict.items():
            # The wavelet filters are constants, whatever the file contains.
            assert ".idwt." in key or torch.equal(value, weights[key].to(value.dtype)), key


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.floats(-12, 3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**16),
)
def test_a_rounded_weight_is_off_by_half_a_step_at_most(
    rows: int, columns: int, exponent: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 2**exponent).to(dtype)
    rounded, scale = to_int8(weight)
    assert rounded.dtype == torch.int8 and scale.shape == (rows, 1)
    off = (rounded.double() * scale.double() - weight.double()).abs()
    assert (off <= scale.double() * (0.5 + 1e-4)).all()
    # The largest weight of a row maps exactly to 127.
    assert torch.equal(rounded.abs().amax(1), torch.full((rows,), 127, dtype=torch.int8))


def test_a_row_of_zeros_stays_zero() -> None:
    rounded, scale = to_int8(torch.zeros(2, 3, dtype=torch.half))
    assert not rounded.any() and scale.isfinite().all()


def test_a_rounded_layer_does_not_overflow_where_a_whole_one_does_not() -> None:
    layer = nn.Linear(64, 3, dtype=torch.half)
    nn.init.constant_(layer.weight, 0.02)
    rounded = Int8Linear(64, 3)
    rounded.load_state_dict(layer.state_dict(), assign=True)
    x = torch.full((1, 64), 500.0).half()
    torch.testing.assert_close(rounded(x), layer(x), rtol=0.01, atol=0)


def size_of(module: nn.Module) -> int:
    return sum(value.nbytes for value in [*module.parameters(), *module.buffers()])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_halves_the_layers_and_stays_close(tmp_path: Path, dtype: torch.dtype) -> None:
    config = CONFIG | {"hidden_size": 240, "num_layers": 3}
    weights = weights_like("rudolph", config)
    store.write_checkpoint(tmp_path / "w", weights, family="rudolph", config=config)
    whole = store.load_weights(tmp_path / "w", dtype=torch.float32)
    half = store.load_weights(tmp_path / "w")
    small = store.load_weights(tmp_path / "w", dtype=dtype, int8=True)
    assert size_of(small.layers) < 0.52 * size_of(half.layers)
    tokens = torch.arange(18).view(2, 9) % 9
    expected, found = whole(tokens), small(tokens).float()
    # A row of 240 normal numbers reaches 3 sigma, so one of 127 levels has a random error of
    # 3 / 127 / sqrt(12) = 0.7% of sigma. Two such products in succession give 1%.
    error = (found - expected).norm() / expected.norm()
    assert 0.001 < error < 0.01
    # A whole decoder with rounded weights in its layers gives the same numbers.
    for name, layer in whole.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("layers."):
            rounded, scale = to_int8(layer.weight.detach())
            layer.weight.data = rounded * scale
    tolerance = {torch.float32: 1e-6, torch.float16: 0.002, torch.bfloat16: 0.02}[dtype]
    assert (found - whole(tokens)).norm() / expected.norm() < tolerance


def test_int8_is_for_decoders(tmp_path: Path) -> None:
    config = {"scale": 2, "num_feat": 4, "num_block": 1, "num_grow_ch": 2}
    weights = weights_like("realesrgan", config)
    store.write_checkpoint(tmp_path / "w", weights, family="realesrgan", config=config)
    words = complaint(store.load_weights, tmp_path / "w", int8=True)
    assert words.endswith("w: expected a decoder for int8, got a realesrgan model")


MEMORY = """
import json, os, sys, threading
from pathlib import Path
import torch
from rudolph.models.reference import from_reference
from rudolph.checkpoints import store
from rudolph.checkpoints.checkpoint_files import read_tensors

whole, small = (Path(folder) for folder in sys.argv[1:3])
size = (whole / "w.bin").stat().st_size

def bytes_of(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def read_all(model):
    for value in model.parameters():
        value.detach().sum()

def measured(load):
    '''Peak growth of resident and of anonymous memory, in sizes of the file.'''
    resident, before = bytes_of("VmRSS"), bytes_of("RssAnon")
    peaks, is_done = [before], threading.Event()
    def watch():
        while not is_done.wait(0.001):
            peaks.append(bytes_of("RssAnon"))
    watcher = threading.Thread(target=watch)
    watcher.start()
    load()
    is_done.set()
    watcher.join()
    return [(bytes_of("VmHWM") - resident) / size, (max(peaks) - before) / size]

def loads(folder):
    pickled, config = folder / "w.bin", json.loads((folder / "config.json").read_text())
    return {
        "pickle": lambda: read_all(from_reference("rudolph", config, read_tensors(pickled))),
        "converting": lambda: store.convert_checkpoint(
            pickled, folder / "w", family="rudolph", config=config
        ),
        "safetensors": lambda: read_all(store.load_weights(folder / "w")),
        "float32": lambda: read_all(store.load_weights(folder / "w", dtype=torch.float32)),
    }

with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # what it imports, once for all children
for name, load in loads(whole).items():
    # A child's peak begins with what it has then.
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        # Pages of the libraries are no cost of a checkpoint: a small one brings them in.
        for warm in loads(small).values():
            warm()
        print(name, *measured(load), flush=True)
        os._exit(0)
"""


def test_a_checkpoint_loads_in_little_more_than_its_size(tmp_path: Path) -> None:
    shape = {"num_layers": 2, "hidden_size": 512, "num_attention_heads": 8}
    folders = [tmp_path / "whole", tmp_path / "small"]
    for folder, vocab_size in zip(folders, (85_000, 50), strict=True):
        folder.mkdir()
        config = CONFIG | shape | {"vocab_size": vocab_size}
        torch.save(weights_like("rudolph", config), folder / "w.bin")
        (folder / "config.json").write_text(json.dumps(config))
    assert (folders[0] / "w.bin").stat().st_size > 180e6
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    peaks = {
        name: (float(resident), float(anonymous))
        for name, resident, anonymous in map(str.split, run.stdout.splitlines())
    }
    for name in ("pickle", "converting", "safetensors"):
        assert peaks[name][0] < 1.2, peaks
        assert peaks[name][1] < 0.1, peaks
    # Pages of the mapped file can be dropped at any time; the float32 tensors are twice as large.
    assert peaks["float32"][1] < 1.2 * 2, peaks
