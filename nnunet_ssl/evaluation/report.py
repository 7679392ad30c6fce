"""What a study found: tables of its runs beside published figures, with intervals and corrected paired tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ssl.evaluation.segmentations import NAMES, RATES, scored
from nnunet_ssl.evaluation.stages import results_of
from nnunet_ssl.evaluation.statistics import holm, mean_interval, paired_wilcoxon, rate_interval
from nnunet_ssl.evaluation.study import Experiment, Published, Run, Study
from nnunet_ssl.files import written_beside
from nnunet_ssl.pages import write_page

PARTS = ("test", "validation")
KEY = ("arm", "dataset", "fraction", "part")
SIGNIFICANT = 0.05


def read_cases(study: Study, folder: Path) -> pd.DataFrame:
    """Read the cases of every evaluated run: run (its identifier), arm, dataset, fraction, seed, fold, part (validation
    or test), case and the metrics of :class:`nnunet_ssl.evaluation.lesions.CaseMetrics`."""
    tables = []
    for run in study.runs():
        for part in PARTS if isinstance(run, Run) else ():
            path = results_of(run, folder) / part / "lesions.json"
            if path.is_file():
                cases = pd.DataFrame(json.loads(path.read_text())["cases"])
                names = ("arm", "dataset", "fraction", "seed", "fold")
                tables.append(cases.assign(**{name: getattr(run, name) for name in names}, part=part, run=run.id))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def values_of(cases: pd.DataFrame, metric: str, preset: str) -> pd.Series:
    """Return a metric by case, averaged over the runs (folds, seeds) that evaluated the case."""
    known = scored(cases, metric, preset)
    return known.groupby(cases.loc[known.index, "case"]).mean()


def summarize_cells(study: Study, experiment: Experiment, cases: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm, data set, fraction, part and metric: the mean over cases with its 95 % interval.

    Cases that several runs evaluated count once, with their mean. ``sd_of_runs`` is the standard deviation of the runs'
    own means, where there are several.
    """
    rows = []
    for key, cell in _cells(study, experiment, cases).items():
        preset = study.datasets[key[1]].preset
        for metric in experiment.metrics:
            values = values_of(cell, metric, preset)
            if not len(values):
                continue
            each = pd.Series([scored(one, metric, preset).mean() for _, one in cell.groupby(["seed", "fold"])])
            interval = rate_interval if metric in RATES and values.isin([0, 1]).all() else mean_interval
            low, high = interval(values.to_numpy())
            figures = {"mean": values.mean(), "low": low, "high": high, "n_cases": len(values), "n_runs": len(each)}
            rows.append(dict(zip(KEY, key)) | {"metric": metric} | figures | {"sd_of_runs": each.std(ddof=1)})
    return pd.DataFrame(rows)


def compare_arms(study: Study, experiment: Experiment, cases: pd.DataFrame) -> pd.DataFrame:
    """Test the experiment's pairs of arms on the cases that both have, on its first metric.

    Wilcoxon's signed-rank test on cases, corrected by Holm over all tests of the experiment.
    """
    metric, cells, rows = experiment.metrics[0], _cells(study, experiment, cases), []
    for dataset, fraction in experiment.columns:
        for part in PARTS:
            for arm, other in experiment.compare:
                pair = [cells.get((name, dataset, fraction, part)) for name in (arm, other)]
                if any(one is None for one in pair):
                    continue
                preset = study.datasets[dataset].preset
                first, second = (
                    pd.concat([values_of(one, metric, preset) for one in pair], axis=1, join="inner", keys=(0, 1))
                    .to_numpy()
                    .T
                )
                if len(first):
                    low, high = mean_interval(first - second)
                    rows.append(
                        {"arm": arm, "against": other, "dataset": dataset, "fraction": fraction, "part": part}
                        | {"metric": metric, "difference": (first - second).mean(), "low": low, "high": high}
                        | {"n_cases": len(first), "p": paired_wilcoxon(first, second)}
                    )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].tolist())) if len(table) else table


def read_alignments(study: Study, experiment: Experiment, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the alignment of each arm that was measured."""
    found = {}
    for run in study.runs_of(experiment):
        path = results_of(run, folder) / "alignment.json"
        if path.is_file():
            found[run.arm] = json.loads(path.read_text())
    return found


def collect(study: Study, folder: Path) -> Path:
    """Write the report into ``<folder>/report``; return the path of ``report.md``.

    Beside it lie ``report.html``, one file that opens anywhere, the tables as CSV, and the figures.
    """
    from nnunet_ssl.evaluation.figures.study import draw_fractions, draw_modalities

    out = folder / "report"
    cases = read_cases(study, folder)
    write_csv(cases, out / "cases.csv")
    text = [f"# {study.name}", ""]
    for name, experiment in study.experiments.items():
        text += [f"## {experiment.title}", ""]
        if experiment.kind == "alignment":
            found = read_alignments(study, experiment, folder)
            text += alignment_table(study, experiment, found)
            write_csv(_alignment_rows(found), out / f"{name}.csv")
            continue
        summary, tests = summarize_cells(study, experiment, cases), compare_arms(study, experiment, cases)
        write_csv(summary, out / f"{name}.csv")
        write_csv(tests, out / f"{name}_tests.csv")
        text += segmentation_tables(study, experiment, summary, tests)
        if not len(summary):
            continue
        for draw, wanted in ((draw_fractions, experiment.fractions), (draw_modalities, experiment.datasets)):
            if len(wanted) > 1:
                path = out / f"{name}_{draw.__name__.removeprefix('draw_')}.png"
                draw(study, experiment, summary, path)
                text += [f"![{experiment.title}]({path.name})", ""]
    with written_beside(out / "report.md") as temporary:
        temporary.write_text("\n".join(text))
    write_page(out / "report.html", "\n".join(text), study.name)
    return out / "report.md"


def segmentation_tables(study: Study, experiment: Experiment, summary: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Write one table per metric, and the tests of the first, as lines of Markdown."""
    if not len(summary):
        return ["No run is finished.", ""]
    lines = []
    for metric in experiment.metrics:
        lines += _metric_table(study, experiment, summary[summary["metric"] == metric], tests, metric)
    if len(tests):
        label = {name: arm.label for name, arm in study.arms.items()}
        rows = [
            [
                f"{label[row.arm]} - {label[row.against]}",
                column_label(study, experiment, row.dataset, row.fraction, row.part),
                f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]",
                str(row.n_cases),
                f"{row.p:.2g}",
                f"{row.p_holm:.2g}",
            ]
            for row in tests.itertuples()
        ]
        header = ["arms", "data", f"difference in {NAMES[experiment.metrics[0]]}", "cases", "p", "p (Holm)"]
        lines += markdown(header, rows)
        lines += [f"Wilcoxon's signed-rank test on cases; Holm's correction over these {len(rows)} tests.", ""]
    return lines


def alignment_table(study: Study, experiment: Experiment, found: Mapping[str, dict[str, Any]]) -> list[str]:
    """Write the arms' alignment as lines of Markdown."""
    if not found:
        return ["No run is finished.", ""]
    published = experiment.published.values if experiment.published else {}
    header = ["arm", "cross-modality distance", "published", "cross-subject distance", "retrieval", "effective rank"]
    rows = []
    for arm in experiment.arms:
        one = found.get(arm)
        quoted = f"{published[arm][0]:.4f} +- {published[arm][1]:.4f}" if arm in published else ""
        ours = _alignment_cells(one) if one else ["-"] * 4
        rows.append([study.arms[arm].label, ours[0], quoted, *ours[1:]])
    counts = sorted({one["cross_modality"]["n_patients"] for one in found.values()})
    source = f" Published: {experiment.published.source}." if experiment.published else ""
    note = f"Mean +- standard deviation over {' or '.join(map(str, counts))} patients [95 % interval].{source}"
    return [*markdown(header, rows), note, ""]


def column_label(study: Study, experiment: Experiment, dataset: str, fraction: int, part: str) -> str:
    """Name a column: its data set, its fraction where there are several, and the test set where it is one."""
    share = f" {fraction} %" if len(experiment.fractions) > 1 else ""
    return f"{study.datasets[dataset].label}{share}" + (" (test set)" if part == "test" else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table as lines of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table."""
    with written_beside(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def _cells(study: Study, experiment: Experiment, cases: pd.DataFrame) -> dict[tuple[Any, ...], pd.DataFrame]:
    """The cases of an experiment by arm, data set, fraction and part."""
    if not len(cases):
        return {}
    own = cases["run"].isin([run.id for run in study.runs_of(experiment)])
    return dict(iter(cases[own].groupby(list(KEY), sort=False)))


def _metric_table(
    study: Study, experiment: Experiment, summary: pd.DataFrame, tests: pd.DataFrame, metric: str
) -> list[str]:
    cells = {tuple(row[name] for name in KEY): row for row in summary.to_dict("records")}
    better = _significant(experiment, tests) if metric == experiment.metrics[0] else {}
    published = experiment.published if metric == experiment.metrics[0] else None
    shown = [
        (place, dataset, fraction, part)
        for place, (dataset, fraction) in enumerate(experiment.columns)
        for part in PARTS
        if any((arm, dataset, fraction, part) in cells for arm in experiment.arms)
    ]
    if not shown:
        return []
    header = [NAMES[metric]]
    for _, dataset, fraction, part in shown:
        header += [column_label(study, experiment, dataset, fraction, part)] + ["published"] * bool(published)
    rows = []
    for arm in experiment.arms:
        row = [study.arms[arm].label]
        for place, *column in shown:
            cell = cells.get((arm, *column))
            mark = better.get((arm, *column), "")
            row.append(f"{cell['mean']:.3f}{mark} [{cell['low']:.3f}, {cell['high']:.3f}]" if cell else "-")
            if published:
                row.append(f"{published.values[arm][place]:.4f}" if arm in published.values else "")
        rows.append(row)
    return [*markdown(header, rows), _note(study, experiment, cells, shown, better, published), ""]


def _note(
    study: Study,
    experiment: Experiment,
    cells: Mapping[tuple[Any, ...], Mapping[str, Any]],
    shown: Sequence[tuple[int, str, int, str]],
    better: Mapping[tuple[Any, ...], str],
    published: Published | None,
) -> str:
    """Say what a table's figures are taken over."""
    sizes = []
    for _, dataset, fraction, part in shown:
        present = [cells[key] for arm in experiment.arms if (key := (arm, dataset, fraction, part)) in cells]
        counts = " or ".join(str(n) for n in sorted({one["n_cases"] for one in present}))
        runs = " or ".join(str(n) for n in sorted({one["n_runs"] for one in present}))
        sizes.append(
            f"{column_label(study, experiment, dataset, fraction, part)}: {counts} cases, {runs} run(s) per arm"
        )
    note = f"Mean over cases [95 % interval]. {'; '.join(sizes)}."
    if better:
        first = study.arms[experiment.arms[0]].label
        note += f" *: differs from {first} (p < {SIGNIFICANT} after Holm's correction)."
    return note + (f" Published: {published.source}." if published else "")


def _significant(experiment: Experiment, tests: pd.DataFrame) -> dict[tuple[Any, ...], str]:
    """Which cells differ from the first arm's."""
    if not len(tests):
        return {}
    found = tests[(tests["against"] == experiment.arms[0]) & (tests["p_holm"] < SIGNIFICANT)]
    return {tuple(row[name] for name in KEY): "*" for row in found.to_dict("records")}


def _alignment_cells(one: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        """Of one patient there is neither a spread nor an interval; their figures are null in the JSON."""
        return "n/a" if value is None else format(value, form)

    def distance(entry: Mapping[str, Any]) -> str:
        mean, std, low, high = (number(value, ".4f") for value in (entry["mean"], entry["std"], *entry["interval"]))
        return f"{mean} +- {std} [{low}, {high}]"

    return [
        distance(one["cross_modality"]),
        distance(one["cross_subject"]),
        f"{number(one['retrieval']['accuracy'], '.3f')} (chance {number(one['retrieval']['chance'], '.3f')})",
        f"{number(one['effective_rank']['value'], '.1f')} of {one['dimension']}",
    ]


def _alignment_rows(found: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for arm, one in found.items():
        for measure in ("cross_modality", "cross_subject"):
            low, high = one[measure]["interval"]
            kept = {key: one[measure][key] for key in ("mean", "std", "n_patients")}
            rows.append({"arm": arm, "measure": f"{measure}_distance"} | kept | {"low": low, "high": high})
        for measure, key in (("retrieval", "accuracy"), ("effective_rank", "value"), ("uniformity", "value")):
            low, high = one[measure]["interval"]
            rows.append({"arm": arm, "measure": measure, "mean": one[measure][key], "low": low, "high": high})
    return pd.DataFrame(rows)
