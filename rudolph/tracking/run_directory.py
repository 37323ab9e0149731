"""The folder of a run: the path of each file, its summary and its environment.

    config.yaml        the resolved settings
    summary.json       status, scores and durations
    environment.json   machine, versions and digests of the data
    journal.*          the event log, how far it has been sent, and the sending process's lock
    checkpoints/       weights and tokenizer
    samples/           images
    shared.txt         the names of the cache folders that the run used, one per line
    traceback.txt      the error that ended the run
    running.lock       held by the process that executes the run

``report_card.csv`` and ``speed/`` also lie in result folders, see ``reports``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rudolph.files.atomic import DamagedFileError, read_mapping, write_json
from rudolph.tracking.event_log import JOURNAL, STATUSES

CONFIG, SUMMARY, ENVIRONMENT = "config.yaml", "summary.json", "environment.json"
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
FINITE_NUMBER = (int, float)
# The texts that ``json_number`` writes.
NOT_FINITE = ("nan", "inf", "-inf")
NUMERIC_COLUMNS = ("metrics", "chance", "target", "seconds")


class RunDirectory:
    """The paths of a run's files, which need not exist; see the module for their content."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.summary = path / CONFIG, path / SUMMARY
        self.environment = path / ENVIRONMENT
        self.event_log = path / JOURNAL
        self.sending_lock, self.running_lock = path / "journal.lock", path / "running.lock"
        self.checkpoints, self.samples = path / CHECKPOINTS, path / SAMPLES
        self.shared, self.traceback = path / "shared.txt", path / "traceback.txt"

    def weights(self) -> list[Path]:
        """Return the paths of all weights, sorted."""
        return sorted(self.checkpoints.rglob("*.safetensors"))

    def summary_time(self) -> float:
        """Return when the summary was written, in seconds since the epoch."""
        return self.summary.stat().st_mtime

    def write_summary(
        self, content: Mapping[str, Any], *, status: str, seconds: Mapping[str, float]
    ) -> None:
        """Write the summary with the status and the seconds of each stage, atomically."""
        write_json(self.summary, {**content, "status": status, "seconds": dict(seconds)})

    def read_summary(self) -> dict[str, Any]:
        """Return the summary.

        Raises:
            DamagedFileError: if it is not a valid summary.
            OSError: if it cannot be read.
        """
        path = self.summary
        texts = dict.fromkeys(("run", "variant", "digest", "commit", "status"), str)
        content = read_mapping(path, seed=int, dirty=bool, metrics=dict, seconds=dict, **texts)
        if content["status"] not in STATUSES:
            raise DamagedFileError(path, f"unknown status {content['status'][:20]!r}")
        for name in (*NUMERIC_COLUMNS, "grid", "intervals"):
            values = content.get(name, {})
            if not isinstance(values, dict):
                raise DamagedFileError(path, f"{name} is a {type(values).__name__}")
            if name in NUMERIC_COLUMNS:
                content[name] = values = {key: _number(value) for key, value in values.items()}
                if None in values.values():
                    raise DamagedFileError(path, f"{name} must hold numbers")
        for key, bounds in content.get("intervals", {}).items():
            numbers = [_number(end) for end in bounds] if isinstance(bounds, list) else []
            if len(numbers) != 2 or None in numbers:
                raise DamagedFileError(path, "intervals must hold pairs of numbers")
            content["intervals"][key] = numbers
        return content

    def read_environment(self) -> dict[str, Any]:
        """Return the environment.

        Raises:
            DamagedFileError: if it is not a valid environment.
            OSError: if it cannot be read.
        """
        content = read_mapping(self.environment, machine=dict)
        if not isinstance(content["machine"].get("threads"), FINITE_NUMBER):
            raise DamagedFileError(self.environment, "machine.threads must be a number")
        if not isinstance(content.get("digests", {}), dict):
            raise DamagedFileError(self.environment, "digests must be a mapping")
        return content


def started_runs(folder: Path, pattern: str = "*") -> list[RunDirectory]:
    """Return the runs with a summary, sorted by path; the pattern ** finds runs at any depth."""
    return [RunDirectory(path.parent) for path in sorted(folder.glob(f"{pattern}/{SUMMARY}"))]


def _number(value: Any) -> Any:
    """Return a number of a JSON file, including NaN and infinities as text; None otherwise."""
    if isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    return value if isinstance(value, FINITE_NUMBER) else None
