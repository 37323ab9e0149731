"""What a run left in MLflow, fetched back: its configuration and weights."""

import os
from pathlib import Path

from rudolph.files.atomic import DamagedFileError, warn_once
from rudolph.tracking.event_log import SENT, read_markers

NEEDED = ("config.yaml", "checkpoints")


def local_run(run_id: str, runs: Path) -> Path | None:
    """The folder of an MLflow run that was executed here."""
    for path in runs.rglob(SENT):
        try:
            marks = read_markers(path)
        except (DamagedFileError, OSError) as error:
            warn_once(f"{path}: left out ({error})")
            continue
        if any(mark["run_id"] == run_id for mark in marks.values()):
            return path.parent
    return None


def fetch_run(run_id: str, uri: str, folder: Path) -> Path:
    """The folder of an MLflow run with ``config.yaml`` and ``checkpoints``, fetched once.

    Raises:
        ValueError: when the server has no such run, or the run no weights.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    if (folder / NEEDED[0]).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration comes last, so that a folder that holds it is whole.
    for name in reversed(NEEDED):
        try:
            fetched = download_artifacts(
                run_id=run_id, artifact_path=name, dst_path=str(folder), tracking_uri=uri
            )
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"MLflow run {run_id}: {name} cannot be had ({reason})") from error
        if Path(fetched) != folder / name:
            os.replace(fetched, folder / name)
    return folder
