"""Files are UTF-8 and texts are preserved, whatever the locale of the shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY

import rudolph
from rudolph.reports.report import read_runs
from rudolph.sequence.texts import decode_argument

ROOT = Path(rudolph.__file__).parents[1]
PROMPT = "красный круг"
# Without these variables Python switches an ASCII locale to UTF-8.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def call(folder: Path, *arguments: str) -> None:
    """Run the program with an ASCII locale and require success."""
    environment = (
        os.environ
        | ASCII
        | {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "OMP_NUM_THREADS": "1",
        }
    )
    found = subprocess.run(
        [sys.executable, "-m", "rudolph", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_a_run_and_its_page_are_utf_8_in_an_ascii_locale(tmp_path: Path) -> None:
    question = "Хватает ли байта на букву?"
    content = TINY | {"question": question, "title": "Кодировки", "targets": {}, "report": {}}
    settings = TINY["settings"] | {"evaluation": {"evaluators": ["caption_f1"], "num_examples": 2}}
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(content | {"settings": settings}, allow_unicode=True), encoding="utf-8"
    )
    call(tmp_path, "run", "tiny.yaml", "--precision", "32-true")
    results = tmp_path / "results" / "tiny"
    page = (results / "README.md").read_text("utf-8")
    assert question in page and "Кодировки" in page
    assert len(read_runs(results)) == 1
    call(tmp_path, "generate", PROMPT, "-n", "1", "--model", "newest", "--seed", "3")
    assert f'"prompt": "{PROMPT}"' in (tmp_path / "generated.jsonl").read_text("utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_argument_is_read_from_the_bytes_that_were_typed(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    given = PROMPT.encode().decode(encoding, "surrogateescape")
    assert decode_argument(given) == PROMPT
    # Invalid UTF-8 bytes keep Python's surrogates and are refused later.
    broken = b"\xea\xf0\xf3\xe3".decode(encoding, "surrogateescape")
    assert decode_argument(broken) == broken
