"""Report cards: every score of a run with its interval, chance level, count and protocol.

``report_card.csv`` has one row per score.  In ``results/`` it holds all runs of an experiment.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rudolph.evaluation.statistics import mean_over_seeds
from rudolph.files.atomic import DamagedFileError, read_mapping, write_text
from rudolph.reports.markdown import table_row
from rudolph.reports.schema import CARD, CARD_COLUMNS
from rudolph.tracking.run_directory import RunDirectory


def write_card(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with the keys of ``CARD_COLUMNS`` as one report card."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CARD_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row[name] for name in CARD_COLUMNS} for row in rows)
    write_text(path, text.getvalue())


def read_card(path: Path) -> pd.DataFrame:
    """Return a report card of one run, or of several with the extra column ``run``.

    Raises:
        DamagedFileError: if it is not such a table.
    """
    texts = dict.fromkeys(("run", "score", "split", "protocol"), "string")
    advice = "evaluate the run again with rudolph report-card --again"
    try:
        card = pd.read_csv(path, dtype=texts)
    except ValueError as error:
        reason = f"no such table: {' '.join(str(error).split())[:80]}"
        raise DamagedFileError(path, reason, advice) from error
    if not set(CARD_COLUMNS) <= set(card):
        raise DamagedFileError(path, f"expected the columns {', '.join(CARD_COLUMNS)}", advice)
    for name in ("value", "low", "high", "chance", "count"):
        if not pd.api.types.is_numeric_dtype(card[name]):
            raise DamagedFileError(path, f"{name} must hold numbers", advice)
    return card


def require_same_data(folder: Path, other: Path, splits: Iterable[str]) -> None:
    """Check that two runs were evaluated on the same data of some splits.

    Their training data may differ, since a comparison may be about it.  A packed run has no record
    of its data and passes the check.

    Raises:
        ValueError: if the data of a split differ.
    """
    paths = [RunDirectory(run_folder).environment for run_folder in (folder, other)]
    if not all(path.is_file() for path in paths):
        return
    own_digests, other_digests = (read_mapping(path, digests=dict)["digests"] for path in paths)
    data_keys = {f"data.{split}" for split in splits}
    for key in sorted(own_digests.keys() & other_digests.keys()):
        if ".".join(key.split(".")[:2]) in data_keys and own_digests[key] != other_digests[key]:
            raise ValueError(
                f"{folder} and {other}: expected the same data, got different {key}. The scores "
                "are not comparable"
            )


def export_cards(runs: Mapping[str, Path], folder: Path) -> None:
    """Write the report cards of all runs as one file; delete the file if no run has one."""
    target = folder / CARD
    target.unlink(missing_ok=True)
    paths = [(name, path / CARD) for name, path in sorted(runs.items())]
    frames = [read_card(path).assign(run=name) for name, path in paths if path.is_file()]
    if frames:
        table = pd.concat(frames)[["run", *CARD_COLUMNS]]
        write_text(target, table.to_csv(index=False, lineterminator="\n"))


def card_table(card: pd.DataFrame, scores: Sequence[str]) -> list[str]:
    """Return a Markdown table with one row per requested score and run."""
    has_one_run = card["run"].nunique() == 1
    head = [
        *([] if has_one_run else ["run"]),
        "score",
        "value",
        "95 % interval",
        "chance",
        "count",
    ]
    lines = [table_row(head), table_row(["---"] * len(head))]
    rank = {name: index for index, name in enumerate(scores)}
    selected = card[card["score"].isin(rank)].assign(rank=lambda rows: rows["score"].map(rank))
    for row in selected.sort_values(["rank", "run"]).to_dict("records"):
        chance = "" if pd.isna(row["chance"]) else f"{row['chance']:.3g}"
        cells = [
            str(row["score"]),
            f"{row['value']:.3g}",
            f"{row['low']:.3g} to {row['high']:.3g}",
            chance,
            str(row["count"]),
        ]
        lines.append(table_row([*([] if has_one_run else [str(row["run"])]), *cells]))
    return lines


def mean_card(card: pd.DataFrame) -> pd.DataFrame:
    """Return a card of several runs with the mean over the seeds of each score.

    ``run`` is then the name without its seed.  The interval over seeds is Student's t interval; a
    run with one seed keeps its own.
    """
    groups = card.assign(run=card["run"].str.replace(r"-?seed\d+$", "", regex=True))
    rows = []
    for _, seeds in groups.groupby(["run", "score"], sort=False):
        row = seeds.iloc[0].to_dict()
        if len(seeds) > 1:
            value, low, high = mean_over_seeds(seeds["value"].to_numpy())
            row |= {"value": value, "low": low, "high": high, "chance": seeds["chance"].mean()}
        rows.append(row)
    return pd.DataFrame(rows, columns=card.columns)


def draw_card(path: Path) -> Path:
    """Draw a run's scores between 0 and 1 next to its report card; return the figure's path."""
    # Imported here: reading a card does not wait for matplotlib.
    from rudolph.reports.figures import card
    from rudolph.reports.style import warned_drawing

    scores = read_card(path).assign(run="")
    selected = scores[(scores["high"] <= 1) & (scores["low"] >= 0)]
    target = path.with_suffix(".svg")
    with warned_drawing():
        card(selected, target, y=list(selected["score"]), x="score", group_column="run")
    return target
