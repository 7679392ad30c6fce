"""What the fine-tunings of a study scored: means over cases with intervals, and corrected paired tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from nnunet_ssl.evaluation.segmentations import NAMES, RATES, scored
from nnunet_ssl.evaluation.statistics import holm, mean_interval, paired_wilcoxon, rate_interval
from nnunet_ssl.pages import markdown_table
from nnunet_ssl.studies.places import results_of
from nnunet_ssl.studies.study import CLASSES, Experiment, Run, Study

SIGNIFICANT = 0.05


class Cell(NamedTuple):
    """What a figure of a table is of."""

    arm: str
    dataset: str
    fraction: int
    part: str  # "validation", "test", or the name of one of the data set's tests

    def at(self, experiment: Experiment, row: str) -> Cell:
        """The cell of this column in another row."""
        return self._replace(arm=row) if experiment.down == "arms" else self._replace(dataset=row)


Row: TypeAlias = Mapping[str, Any]


def read_cases(study: Study, folder: Path) -> pd.DataFrame:
    """Read the cases of every evaluated run: run (its identifier), arm, dataset, fraction, seed, fold, part (see
    :class:`Cell`), case and the metrics of :class:`nnunet_ssl.evaluation.lesions.CaseMetrics`; of what is no lesion,
    the mean Dice of a case's labels alone."""
    tables = []
    for run in (run for run in study.runs() if isinstance(run, Run)):
        for part in study.datasets[run.dataset].parts:
            cases = _cases_of(results_of(run, folder) / part, study.datasets[run.dataset].preset)
            if cases is not None:
                names = ("arm", "dataset", "fraction", "seed", "fold")
                tables.append(cases.assign(**{name: getattr(run, name) for name in names}, part=part, run=run.id))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def values_of(cases: pd.DataFrame, metric: str, preset: str) -> pd.Series:
    """Return a metric by case, averaged over the runs (folds, seeds) that evaluated the case."""
    known = _scored(cases, metric, preset)
    return known.groupby(cases.loc[known.index, "case"]).mean()


def summarize_cells(study: Study, experiment: Experiment, cases: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm, data set, fraction, part and metric: the mean over cases with its 95 % interval.

    Cases that several runs evaluated count once, with their mean. ``sd_of_runs`` is the standard deviation of the runs'
    own means, where there are several.
    """
    rows = []
    for cell, own in _cells(study, experiment, cases).items():
        preset = study.datasets[cell.dataset].preset
        for metric in _metrics(experiment, own):
            values = values_of(own, metric, preset)
            if not len(values):
                continue
            each = pd.Series([_scored(one, metric, preset).mean() for _, one in own.groupby(["seed", "fold"])])
            interval = rate_interval if metric in RATES and values.isin([0, 1]).all() else mean_interval
            low, high = interval(values.to_numpy())
            figures = {"mean": values.mean(), "low": low, "high": high, "n_cases": len(values), "n_runs": len(each)}
            rows.append(cell._asdict() | {"metric": metric} | figures | {"sd_of_runs": each.std(ddof=1)})
    return pd.DataFrame(rows)


def compare_rows(study: Study, experiment: Experiment, cases: pd.DataFrame) -> pd.DataFrame:
    """Test the experiment's pairs of arms, or of data sets, on the cases that both have, on its first metric.

    Wilcoxon's signed-rank test on cases, corrected by Holm over all tests of the experiment.
    """
    metric, cells, rows = experiment.metrics[0], _cells(study, experiment, cases), []
    for column in columns_of(study, experiment, list(cells)):
        for row, other in experiment.compare:
            pair = [(cell, cells.get(cell)) for cell in (column.at(experiment, row), column.at(experiment, other))]
            if any(own is None for _, own in pair):
                continue
            values = [values_of(own, metric, study.datasets[cell.dataset].preset) for cell, own in pair]
            first, second = pd.concat(values, axis=1, join="inner", keys=(0, 1)).to_numpy().T
            if len(first):
                low, high = mean_interval(first - second)
                rows.append(
                    pair[0][0]._asdict()
                    | {"against": other, "metric": metric, "difference": (first - second).mean()}
                    | {"low": low, "high": high, "n_cases": len(first), "p": paired_wilcoxon(first, second)}
                )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].tolist())) if len(table) else table


def segmentation_tables(study: Study, experiment: Experiment, summary: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Write one table per metric, and the tests of the first, as lines of Markdown."""
    if not len(summary):
        return ["No run is finished.", ""]
    lines = []
    for metric in experiment.metrics:
        lines += _metric_table(study, experiment, summary[summary["metric"] == metric], tests, metric)
    return lines + _test_table(study, experiment, tests)


def heat_map(study: Study, experiment: Experiment, summary: pd.DataFrame) -> pd.DataFrame:
    """Return the means of the first metric at the largest fraction: a table of labels, rows down and columns across."""
    cells = _by_cell(summary[summary["metric"] == experiment.metrics[0]])
    columns = [
        column for column in columns_of(study, experiment, list(cells)) if column.fraction == max(experiment.fractions)
    ]
    return pd.DataFrame(
        [
            [cells[cell]["mean"] if (cell := column.at(experiment, row)) in cells else np.nan for column in columns]
            for row in rows_of(experiment)
        ],
        index=[row_label(study, experiment, row) for row in rows_of(experiment)],
        columns=[column_label(study, experiment, column) for column in columns],
    )


def cell_intervals(study: Study, experiment: Experiment, summary: pd.DataFrame) -> pd.DataFrame:
    """Return the first metric, mean, low and high, by the label of the column (``panel``) and that of the ``row``."""
    cells = _by_cell(summary[summary["metric"] == experiment.metrics[0]])
    entries = [
        {"panel": column_label(study, experiment, column), "row": row_label(study, experiment, row)}
        | {key: cells[cell][key] for key in ("mean", "low", "high")}
        for column in columns_of(study, experiment, list(cells))
        for row in rows_of(experiment)
        if (cell := column.at(experiment, row)) in cells
    ]
    return pd.DataFrame(entries)


def difference_intervals(study: Study, experiment: Experiment, tests: pd.DataFrame) -> pd.DataFrame:
    """Return the tested differences, low and high, by the label of the column (``panel``) and of the pair (``row``)."""
    labels = [_test_labels(study, experiment, test) for test in tests.to_dict("records")]
    return tests.rename(columns={"difference": "mean"}).assign(
        row=[pair for pair, _ in labels], panel=[column for _, column in labels]
    )


def rows_of(experiment: Experiment) -> tuple[str, ...]:
    """The names of a table's rows."""
    return experiment.arms if experiment.down == "arms" else experiment.datasets


def row_label(study: Study, experiment: Experiment, row: str) -> str:
    """Name a row."""
    return study.arms[row].label if experiment.down == "arms" else study.datasets[row].label


def columns_of(study: Study, experiment: Experiment, present: Sequence[Cell]) -> list[Cell]:
    """The columns in order, each as its cell in the first row, as far as any row has something in them."""
    first = rows_of(experiment)[0]
    if experiment.down == "arms":
        wanted = [
            Cell(first, dataset, fraction, part)
            for dataset, fraction in experiment.columns
            for part in study.datasets[dataset].parts
        ]
    else:
        parts = dict.fromkeys(part for name in experiment.datasets for part in study.datasets[name].parts)
        wanted = [
            Cell(arm, first, fraction, part)
            for arm in experiment.arms
            for fraction in experiment.fractions
            for part in parts
        ]
    return [column for column in wanted if any(column.at(experiment, row) in present for row in rows_of(experiment))]


def column_label(study: Study, experiment: Experiment, column: Cell) -> str:
    """Name a column: its data set or its arm, its fraction where there are several, and what it is evaluated on."""
    name = study.datasets[column.dataset].label if experiment.down == "arms" else study.arms[column.arm].label
    share = f" {column.fraction} %" if len(experiment.fractions) > 1 else ""
    part = {"validation": "", "test": " (test set)"}.get(column.part, f" ({column.part})")
    return f"{name}{share}{part}"


def _cases_of(results: Path, preset: str) -> pd.DataFrame | None:
    path = results / ("summary.json" if preset == CLASSES else "lesions.json")
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if preset != CLASSES:
        return pd.DataFrame(found["cases"])
    return pd.DataFrame(
        {
            "case": [
                Path(one["prediction_file"].removesuffix(".gz")).stem  # a case may have dots in its name
                for one in found["metric_per_case"]
            ],
            "dice": [
                np.nanmean([label["Dice"] for label in one["metrics"].values()]) for one in found["metric_per_case"]
            ],
        }
    )


def _metrics(experiment: Experiment, cases: pd.DataFrame) -> list[str]:
    return [metric for metric in experiment.metrics if metric in cases and cases[metric].notna().any()]


def _scored(cases: pd.DataFrame, metric: str, preset: str) -> pd.Series:
    return cases[metric].dropna().astype(np.float64) if preset == CLASSES else scored(cases, metric, preset)


def _cells(study: Study, experiment: Experiment, cases: pd.DataFrame) -> dict[Cell, pd.DataFrame]:
    """The cases of an experiment by what they are of."""
    if not len(cases):
        return {}
    own = cases["run"].isin([run.id for run in study.runs_of(experiment)])
    return {Cell(*key): cell for key, cell in cases[own].groupby(list(Cell._fields), sort=False)}


def _by_cell(table: pd.DataFrame) -> dict[Cell, Row]:
    return {Cell(*(row[name] for name in Cell._fields)): row for row in table.to_dict("records")}


def _metric_table(
    study: Study, experiment: Experiment, summary: pd.DataFrame, tests: pd.DataFrame, metric: str
) -> list[str]:
    cells = _by_cell(summary)
    first = metric == experiment.metrics[0]
    better = _significant(experiment, tests) if first else set()
    published = experiment.published.values if first and experiment.published else {}
    columns = columns_of(study, experiment, list(cells))
    if not columns:
        return []
    header = [NAMES[metric]]
    for column in columns:
        header += [column_label(study, experiment, column)] + ["published"] * bool(published)
    rows = []
    for name in rows_of(experiment):
        row = [row_label(study, experiment, name)]
        for column in columns:
            cell = cells.get(column.at(experiment, name))
            mark = "*" if column.at(experiment, name) in better else ""
            row.append(f"{cell['mean']:.3f}{mark} [{cell['low']:.3f}, {cell['high']:.3f}]" if cell else "-")
            if published:
                place = experiment.columns.index((column.dataset, column.fraction))
                row.append(f"{published[name][place]:.4f}" if name in published else "")
        rows.append(row)
    note = _note(study, experiment, cells, columns)
    if better:
        against = row_label(study, experiment, rows_of(experiment)[0])
        note += f" *: differs from {against} (p < {SIGNIFICANT} after Holm's correction)."
    if published and experiment.published:
        note += f" Published: {experiment.published.source}."
    return [*markdown_table(header, rows), note, ""]


def _note(study: Study, experiment: Experiment, cells: Mapping[Cell, Row], columns: Sequence[Cell]) -> str:
    """Say what a table's figures are taken over."""
    sizes = []
    for column in columns:
        present = [cells[key] for row in rows_of(experiment) if (key := column.at(experiment, row)) in cells]
        counts = " or ".join(str(n) for n in sorted({one["n_cases"] for one in present}))
        runs = " or ".join(str(n) for n in sorted({one["n_runs"] for one in present}))
        sizes.append(
            f"{column_label(study, experiment, column)}: {counts} cases, {runs} run(s) per {experiment.down[:-1]}"
        )
    return f"Mean over cases [95 % interval]. {'; '.join(sizes)}."


def _test_table(study: Study, experiment: Experiment, tests: pd.DataFrame) -> list[str]:
    if not len(tests):
        return []
    rows = []
    for test in tests.to_dict("records"):
        rows.append(
            [
                *_test_labels(study, experiment, test),
                f"{test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}]",
                str(test["n_cases"]),
                f"{test['p']:.2g}",
                f"{test['p_holm']:.2g}",
            ]
        )
    rows_are, columns_are = ("arms", "data") if experiment.down == "arms" else ("data", "arms")
    header = [rows_are, columns_are, f"difference in {NAMES[experiment.metrics[0]]}", "cases", "p", "p (Holm)"]
    note = f"Wilcoxon's signed-rank test on cases; Holm's correction over these {len(rows)} tests."
    return [*markdown_table(header, rows), note, ""]


def _test_labels(study: Study, experiment: Experiment, test: Row) -> tuple[str, str]:
    """Name what is compared, and the column where."""
    cell = Cell(*(test[name] for name in Cell._fields))
    row = cell.arm if experiment.down == "arms" else cell.dataset
    pair = f"{row_label(study, experiment, row)} - {row_label(study, experiment, test['against'])}"
    return pair, column_label(study, experiment, cell)


def _significant(experiment: Experiment, tests: pd.DataFrame) -> set[Cell]:
    """Which cells differ from those of the first row."""
    if not len(tests):
        return set()
    return set(_by_cell(tests[(tests["against"] == rows_of(experiment)[0]) & (tests["p_holm"] < SIGNIFICANT)]))
