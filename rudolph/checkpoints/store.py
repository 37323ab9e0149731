"""Local weights, by name or path: one safetensors file and its config per folder.

``<weights home>/<name>/`` holds ``weights.safetensors`` and ``config.json``.  The tensors have
the names that the published package, the *reference*, gives them.  The config has family,
constructor arguments and origin.  Companion files such as ``bpe.model`` lie in the same folder.
The weights home is ``RUDOLPH_WEIGHTS``, by default ``~/.cache/rudolph``.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rudolph.checkpoints.checkpoint_files import ConvertedTensors, first_sentence, read_tensors
from rudolph.checkpoints.hub import FetchedFile, fetch
from rudolph.checkpoints.releases import RELEASED, Release
from rudolph.files.atomic import json_text, read_json, require_disjoint_paths, write_atomic
from rudolph.models.cpu.int8 import use_int8
from rudolph.models.reference import (
    REFERENCE_FAMILIES,
    empty_model,
    load_reference,
    unwrap_state_dict,
)
from rudolph.sequence.bpe import read_model

WEIGHTS_FILE = "weights.safetensors"
WEIGHTS_CONFIG_FILE = "config.json"
TOKENIZER_FILE = "bpe.model"

OnFileBytes = Callable[[str, int, int], None]


def weights_home() -> Path:
    """Return the folder of all released weights on this disk."""
    return Path(os.environ.get("RUDOLPH_WEIGHTS") or Path.home() / ".cache" / "rudolph")


def release_of(name: str) -> Release:
    """Return the release with this name, ignoring case.

    Raises:
        ValueError: if the name is unknown; the message suggests the nearest one.
    """
    names = {known.lower(): known for known in RELEASED}
    if name.lower() in names:
        return RELEASED[names[name.lower()]]
    nearest = get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {names[nearest[0]]}?" if nearest else ""
    raise ValueError(f"{name}: no released model has this name{hint} (rudolph models lists them)")


def is_released(name: str) -> bool:
    """Return whether a release has this name, ignoring case."""
    return name.lower() in {known.lower() for known in RELEASED}


def release_folder(name: str) -> Path:
    """Return the folder of a release, whether it is pulled or not.

    Raises:
        KeyError: if no release has this name.
    """
    names = {known.lower(): known for known in RELEASED}
    return weights_home() / names[name.lower()]


def is_pulled(name: str) -> bool:
    """Return whether a release is on this disk, converted and complete."""
    release = release_of(name)
    is_tokenizer = release.family == "tokenizer"
    files = (
        (TOKENIZER_FILE,)
        if is_tokenizer
        else (WEIGHTS_FILE, WEIGHTS_CONFIG_FILE, *release.companions)
    )
    return all((release_folder(name) / file).is_file() for file in files)


def locate(source: str) -> Path:
    """Return the folder of weights for a released name or a path.

    Raises:
        ValueError: if the name is unknown or not pulled yet; the message includes the remedy.
    """
    if Path(source).exists():
        return Path(source)
    release_of(source)
    if not is_pulled(source):
        raise ValueError(f"{source}: not on this disk. Run `rudolph pull {source}`")
    return release_folder(source)


def pull_release(
    name: str, *, file: Path | None = None, on_bytes: OnFileBytes | None = None
) -> Path:
    """Download a release and convert it to one safetensors file with its config.

    Args:
        name: the name of the release, in upper or lower case.
        file: the released file, if it is already on this disk; otherwise it is downloaded.
            Companion files next to it are used too.
        on_bytes: called with the file's name and the numbers of local bytes and of all bytes.

    Returns:
        The folder of the release.

    Raises:
        ValueError: if anything fails; the message is one line with advice.
    """
    release, folder = release_of(name), release_folder(name)
    download = folder / "download"
    report = on_bytes or (lambda file, done, total: None)
    origin = {"repository": release.repository, "file": release.file, "licence": release.licence}

    def download_file(file_name: str) -> FetchedFile:
        return fetch(
            release.repository, file_name, download, on_progress=partial(report, file_name)
        )

    if file is not None and not file.is_file():
        raise ValueError(f"{file}: no such file")
    if file is not None:
        # The download folder is deleted at the end.
        require_disjoint_paths(file, download, "--file")
    for companion in release.companions:
        path = None if file is None else file.with_name(companion)
        if path is None or not path.is_file():
            path = download_file(companion).path
        copy_atomic(path, folder / companion)
    if file is None:
        fetched = download_file(release.file)
        file, origin = fetched.path, origin | {"sha256": fetched.sha256, "commit": fetched.commit}
    if release.family == "tokenizer":
        copy_atomic(file, folder / TOKENIZER_FILE)
    else:
        convert_checkpoint(
            file, folder, family=release.family, config=release.config, origin=origin
        )
    shutil.rmtree(download, ignore_errors=True)
    return folder


def copy_atomic(file: Path, path: Path) -> None:
    """Copy a companion file atomically.

    Raises:
        ValueError: if the target is a tokenizer and the file is not.
    """
    if path.name == TOKENIZER_FILE:
        read_model(file)
    write_atomic(path, lambda new: shutil.copyfile(file, new))


def convert_checkpoint(
    file: Path,
    folder: Path,
    *,
    family: str,
    config: Mapping[str, Any],
    origin: Mapping[str, str] | None = None,
) -> None:
    """Convert a reference checkpoint to ``weights.safetensors`` and ``config.json``.

    Nothing is written unless all tensors fit the family.  Tensors keep their names, dtypes and
    bits; tensors that only a trainer needs are left out.  The config is written last, so that a
    folder with a config is complete.

    Args:
        file: the reference checkpoint.
        folder: the folder to write.
        family: a name in ``REFERENCE_FAMILIES``.
        config: the reference constructor's arguments.
        origin: the provenance that ``config.json`` records.

    Raises:
        ValueError: if a tensor does not fit the family; the message names the first such tensor.
    """
    tensors = unwrap_state_dict(read_tensors(file))
    for key, value in tensors.items():
        if not isinstance(key, str) or not key.isprintable():
            raise ValueError(f"{file}: expected a name for every tensor, got {key!r}")
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: {key} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise ValueError(f"{file}: {key} must be a dense tensor with values")
    model = empty_model(family, config)
    load_reference(model, family, tensors)
    kept = {key: tensors[key] for key in tensors if REFERENCE_FAMILIES[family].keeps(key)}
    write_checkpoint(folder, kept, family=family, config=config, origin=origin)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    family: str,
    config: Mapping[str, Any],
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and their config atomically; the tensors have the reference's names.

    Args:
        folder: the folder to write.
        tensors: the tensors by the reference's names.
        family: a name in ``REFERENCE_FAMILIES``.
        config: the reference constructor's arguments.
        origin: the provenance that ``config.json`` records.

    Raises:
        ValueError: if the files cannot be written, for instance because the disk is full.
    """
    content = {"family": family, "config": dict(config), "origin": dict(origin or {})}
    folder.mkdir(parents=True, exist_ok=True)
    weights_path, config_path = (
        folder / f"{WEIGHTS_FILE}.new",
        folder / f"{WEIGHTS_CONFIG_FILE}.new",
    )
    try:
        save_file(contiguous_tensors(tensors), weights_path)
        config_path.write_text(json_text(content, indent=1) + "\n", "utf-8")
        # An old config must never stand next to new weights.
        (folder / WEIGHTS_CONFIG_FILE).unlink(missing_ok=True)
        os.replace(weights_path, folder / WEIGHTS_FILE)
        os.replace(config_path, folder / WEIGHTS_CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: cannot write {WEIGHTS_FILE}: {first_sentence(error)}"
        ) from error
    finally:
        weights_path.unlink(missing_ok=True)
        config_path.unlink(missing_ok=True)


def is_exported(folder: Path) -> bool:
    """Return whether ``rudolph convert`` wrote this folder."""
    try:
        content = read_json(folder / WEIGHTS_CONFIG_FILE)
        return "from" in content["origin"]
    except (ValueError, KeyError, TypeError, OSError):
        return False


def contiguous_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors without shared memory, as safetensors requires; copy if needed."""
    contiguous: dict[str, Tensor] = {}
    end = 0
    for key in sorted(tensors, key=lambda key: tensors[key].data_ptr()):
        value = tensors[key]
        if value.is_contiguous() and value.data_ptr() >= end:
            end = value.data_ptr() + value.nbytes
            contiguous[key] = value
        else:
            contiguous[key] = value.clone(memory_format=torch.contiguous_format)
    return contiguous


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the family and the constructor arguments from the config of a folder of weights.

    Raises:
        ValueError: if the folder has no valid config.
    """
    path = folder / WEIGHTS_CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: not a folder of weights, {WEIGHTS_CONFIG_FILE} is missing")
    try:
        content = read_json(path)
        family, config = content["family"], content["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the keys family and config") from error
    if not isinstance(family, str) or not isinstance(config, dict):
        raise ValueError(f"{path}: expected a name as family and a mapping as config")
    return family, config


def load_weights(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    int8: bool = False,
) -> nn.Module:
    """Load the module of a released name or a folder of weights, in evaluation mode.

    Tensors are read, converted and assigned one at a time, so memory holds at most the module and
    one tensor.

    Args:
        source: a released name, or the path of a folder of weights.
        dtype: the dtype of the weights; None keeps that of the file.
        device: the device of the module.
        int8: whether the layers of a decoder are quantized to 8 bits.

    Raises:
        ValueError: if loading fails; the message is one line with the name, file or tensor.
    """
    folder = locate(str(source))
    with _naming_folder(folder):
        family, config = read_config(folder)
        try:
            model = empty_model(family, config)
        except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError) as error:
            message = (
                f"{folder / WEIGHTS_CONFIG_FILE}: not a {family} model ({first_sentence(error)})"
            )
            raise ValueError(message) from error
    if int8:
        layers = getattr(model, "layers", None)
        if layers is None:
            raise ValueError(f"{source}: expected a decoder for int8, got a {family} model")
        use_int8_on_meta(layers)
    with _naming_folder(folder):
        tensors = ConvertedTensors(read_tensors(folder / WEIGHTS_FILE), dtype=dtype, device=device)
        load_reference(model, family, tensors)
    # Buffers that are in no file, such as masks, are created on the CPU.
    return model.to(device).eval()


@contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Add the folder to every ``ValueError`` and, for a release, the command to pull it again."""
    try:
        yield
    except ValueError as error:
        prefix = "" if str(folder) in str(error) else f"{folder}: "
        is_pulled = folder.parent == weights_home() and is_released(folder.name)
        advice = f". Run `rudolph pull {folder.name}` to download it again" if is_pulled else ""
        raise ValueError(f"{prefix}{error}{advice}") from error


def use_int8_on_meta(layers: nn.Module) -> None:
    """Replace the linear layers by int8 ones on the meta device."""
    with torch.device("meta"):
        use_int8(layers)
