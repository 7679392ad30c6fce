"""What a study measured of encoders: alignment beside published figures, and any figure over the seeds of an arm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ssl.evaluation.gradients import ENCODER, FILE, PARTS, read_runs, summarise_seeds
from nnunet_ssl.evaluation.results import read_table
from nnunet_ssl.evaluation.statistics import holm, paired_t, t_interval
from nnunet_ssl.pages import markdown_table
from nnunet_ssl.studies.places import pretrained, pretrained_encoder, results_of
from nnunet_ssl.studies.running import read_record
from nnunet_ssl.studies.study import Experiment, Measurement, Study

SECONDS = "seconds"


def read_alignments(study: Study, experiment: Experiment, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the alignment of each arm that was measured."""
    found = {}
    for run in study.runs_of(experiment):
        path = results_of(run, folder) / "alignment.json"
        if isinstance(run, Measurement) and path.is_file():
            found[run.arm] = json.loads(path.read_text())
    return found


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
    return [*markdown_table(header, rows), note, ""]


def read_figures(study: Study, experiment: Experiment, folder: Path) -> pd.DataFrame:
    """Read what was measured of each arm and seed: a row for each figure, with arm, seed, figure and value."""
    read = _recorded_figures if experiment.kind == "pretraining" else _measured_figures
    return pd.DataFrame(read(study, experiment, folder), columns=["arm", "seed", "figure", "value"])


def summarize_figures(figures: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm and figure: the mean over seeds with Student's 95 % interval."""
    rows = []
    for (arm, figure), own in figures.groupby(["arm", "figure"], sort=False):
        low, high = t_interval(own["value"])
        rows.append(
            {"arm": arm, "figure": figure, "mean": own["value"].mean(), "low": low, "high": high, "n_seeds": len(own)}
        )
    return pd.DataFrame(rows)


def compare_figures(experiment: Experiment, figures: pd.DataFrame) -> pd.DataFrame:
    """Compare the experiment's pairs of arms, seed by seed: the mean difference of each figure and its 95 % interval,
    and the p-value of the paired t-test, corrected by Holm over all tests of the experiment. How long a pre-training
    took is not among them: it tells of the machine as well."""
    rows = []
    for figure, of_figure in figures[figures["figure"] != SECONDS].groupby("figure", sort=False):
        table = of_figure.pivot(index="seed", columns="arm", values="value")
        for arm, against in experiment.compare:
            if arm not in table or against not in table:
                continue
            difference = (table[arm] - table[against]).dropna()
            if len(difference) < 2:
                continue
            low, high = t_interval(difference)
            rows.append(
                {"arm": arm, "against": against, "figure": figure, "difference": difference.mean()}
                | {"low": low, "high": high, "n_seeds": len(difference), "p": paired_t(difference)}
            )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].tolist())) if len(table) else table


def figure_tables(study: Study, experiment: Experiment, summary: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Write the figures of the arms, and their comparisons, as lines of Markdown."""
    if not len(summary):
        return ["No run is finished.", ""]
    names = list(dict.fromkeys(summary["figure"]))
    cells = {(row["arm"], row["figure"]): row for row in summary.to_dict("records")}
    rows = [
        [study.arms[arm].label, *(_cell(cells.get((arm, name))) for name in names)]
        for arm in experiment.arms
        if any((arm, name) in cells for name in names)
    ]
    seeds = " or ".join(str(n) for n in sorted(set(summary["n_seeds"])))
    lines = [*markdown_table(["arm", *names], rows), f"Mean over {seeds} seed(s) [95 % interval over seeds].", ""]
    if not len(tests):
        return lines
    rows = [
        [
            f"{study.arms[test['arm']].label} - {study.arms[test['against']].label}",
            test["figure"],
            f"{test['difference']:+.4g} [{test['low']:+.4g}, {test['high']:+.4g}]",
            f"{test['p']:.2g}",
            f"{test['p_holm']:.2g}",
        ]
        for test in tests.to_dict("records")
    ]
    note = f"Paired t-tests, seed by seed; Holm's correction over these {len(rows)} tests."
    return [*lines, *markdown_table(["arms", "figure", "difference", "p", "p (Holm)"], rows), note, ""]


def read_gradients(study: Study, experiment: Experiment, folder: Path) -> pd.DataFrame:
    """Summarise what the pre-trainings of each arm recorded of their branches' gradients: the rows of
    :func:`nnunet_ssl.evaluation.gradients.summarise_seeds` with their arm."""
    tables = []
    for arm in experiment.arms:
        runs = [run for seed in experiment.seeds if (run := study.pretraining_of(arm, seed))]
        finished = [pretrained(run, folder) for run in runs if pretrained_encoder(run, folder).is_file()]
        if finished:
            tables.append(summarise_seeds(list(read_runs(finished).values())).assign(arm=arm))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def gradient_tables(study: Study, experiment: Experiment, found: pd.DataFrame) -> list[str]:
    """Write each arm's branches by depth over the whole training, and on the whole encoder by thirds of it."""
    if not len(found):
        return ["No run is finished.", ""]
    lines = []
    for pair, own in found.groupby("pair", sort=False):
        cells = {tuple(row[key] for key in ("arm", "depth", "part", "quantity")): row for row in own.to_dict("records")}
        for name, places in (
            ("depth", [(depth, PARTS[0]) for depth in dict.fromkeys(own["depth"])]),
            ("part of the training", [(ENCODER, part) for part in PARTS[1:]]),
        ):
            quantities = (("ratio", f"norms {pair}"), ("cosine", "cosine"), ("opposed", "opposed rows"))
            rows = [
                [study.arms[arm].label, depth if name == "depth" else part]
                + [_cell(cells.get((arm, depth, part, quantity))) for quantity, _ in quantities]
                for arm in experiment.arms
                for depth, part in places
                if (arm, depth, part, "ratio") in cells
            ]
            lines += markdown_table(["arm", name, *(title for _, title in quantities)], rows)
    seeds = " or ".join(str(n) for n in sorted(set(found["n_runs"])))
    return [
        *lines,
        f"Mean over {seeds} seed(s) [95 % interval over seeds]; norms before balancing; opposed: cosine < 0.",
        "",
    ]


def _measured_figures(study: Study, experiment: Experiment, folder: Path) -> Iterator[tuple[str, int, str, float]]:
    for run in study.runs_of(experiment):
        path = results_of(run, folder) / f"{experiment.kind}.json"
        if isinstance(run, Measurement) and path.is_file():
            found = json.loads(path.read_text())
            named = _of_alignment(found) if run.kind == "alignment" else _of_prediction(found)
            for figure, value in named.items():
                if value is not None:
                    yield run.arm, run.seed, figure, value


def _of_alignment(found: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        "cross-modality distance": found["cross_modality"]["mean"],
        "cross-subject distance": found["cross_subject"]["mean"],
        "retrieval": found["retrieval"]["accuracy"],
        "effective rank": found["effective_rank"]["value"],
    }


def _of_prediction(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The scores, and the first of them for each modality that was trained on and each that was tested on."""
    figures = {name: entry["value"] for name, entry in found["scores"].items()}
    first = next(iter(figures))
    for trained_on, tests in found.get("across", {}).items():
        for tested_on, entry in tests.items():
            figures[f"{first}, {trained_on} to {tested_on}"] = entry["scores"][first]
    return figures


def _recorded_figures(study: Study, experiment: Experiment, folder: Path) -> Iterator[tuple[str, int, str, float]]:
    """The last values of columns of progress.csv, and the seconds that the pre-training took."""
    for seed in experiment.seeds:
        for arm in experiment.arms:
            run = study.pretraining_of(arm, seed)
            if run is None or not pretrained_encoder(run, folder).is_file():
                continue
            table = read_table(pretrained(run, folder) / FILE)
            for column in experiment.metrics:
                known = pd.to_numeric(table[column], errors="coerce").dropna() if column in table else pd.Series()
                if len(known):
                    yield arm, seed, column, float(known.iloc[-1])
            if seconds := read_record(folder, run).get("seconds", {}).get("pretrain"):
                yield arm, seed, SECONDS, float(seconds)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:.4g}, {row['high']:.4g}]"
    return f"{row['mean']:.4g}{interval}"


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


def alignment_rows(found: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
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
