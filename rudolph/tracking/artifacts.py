"""Fetching a run's configuration and weights back from MLflow."""

import os
from pathlib import Path

from rudolph.files.atomic import DamagedFileError, warn_once
from rudolph.tracking.event_log import SENT, read_markers
from rudolph.tracking.run_directory import CHECKPOINTS, CONFIG


def local_run(run_id: str, runs: Path) -> Path | None:
    """Return the folder of an MLflow run that was executed on this machine, else None."""
    for path in runs.rglob(SENT):
        try:
            marks = read_markers(path)
        except (DamagedFileError, OSError) as error:
            warn_once(f"{path}: skipped ({error})")
            continue
        if any(mark["run_id"] == run_id for mark in marks.values()):
            return path.parent
    return None


def fetch_run(run_id: str, uri: str, folder: Path) -> Path:
    """Fetch ``config.yaml`` and ``checkpoints`` of an MLflow run once; return ``folder``.

    Raises:
        ValueError: if the server has no such run, or the run has no weights.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    if (folder / CONFIG).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration is fetched last, so that a folder that holds it is complete.
    for name in (CHECKPOINTS, CONFIG):
        try:
            downloaded = download_artifacts(
                run_id=run_id, artifact_path=name, dst_path=str(folder), tracking_uri=uri
            )
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"MLflow run {run_id}: {name} cannot be downloaded ({reason})"
            ) from error
        if Path(downloaded) != folder / name:
            os.replace(downloaded, folder / name)
    return folder
