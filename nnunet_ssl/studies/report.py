"""What a study found: tables of its runs beside published figures, with intervals and corrected paired tests."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nnunet_ssl.evaluation.segmentations import NAMES
from nnunet_ssl.files import written_beside
from nnunet_ssl.pages import write_page
from nnunet_ssl.studies.encoder_tables import (
    alignment_rows,
    alignment_table,
    compare_figures,
    figure_tables,
    gradient_tables,
    read_alignments,
    read_figures,
    read_gradients,
    summarize_figures,
)
from nnunet_ssl.studies.segmentation_tables import (
    cell_intervals,
    compare_rows,
    difference_intervals,
    heat_map,
    read_cases,
    segmentation_tables,
    summarize_cells,
)
from nnunet_ssl.studies.study import Experiment, Study


def collect(study: Study, folder: Path) -> Path:
    """Write the report into ``<folder>/report``; return the path of ``report.md``.

    Beside it lie ``report.html``, one file that opens anywhere, the tables as CSV, and the figures.
    """
    out = folder / "report"
    cases = read_cases(study, folder)
    write_csv(cases, out / "cases.csv")
    text = [f"# {study.name}", ""]
    if study.synthetic:
        text += ["All brains of this study are synthetic.", ""]
    for name, experiment in study.experiments.items():
        text += [f"## {experiment.title}", ""]
        if experiment.kind == "segmentation":
            text += _segmentation(study, name, experiment, cases, out)
        elif experiment.kind == "alignment" and len(experiment.seeds) == 1:
            found = read_alignments(study, experiment, folder)
            text += alignment_table(study, experiment, found)
            write_csv(alignment_rows(found), out / f"{name}.csv")
        elif experiment.kind == "gradients":
            gradients = read_gradients(study, experiment, folder)
            text += gradient_tables(study, experiment, gradients)
            write_csv(gradients, out / f"{name}.csv")
            text += _gradient_picture(study, name, experiment, gradients, out)
        else:
            text += _figures(study, name, experiment, folder, out)
    with written_beside(out / "report.md") as temporary:
        temporary.write_text("\n".join(text))
    write_page(out / "report.html", "\n".join(text), study.name)
    return out / "report.md"


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table."""
    with written_beside(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def _segmentation(study: Study, name: str, experiment: Experiment, cases: pd.DataFrame, out: Path) -> list[str]:
    from nnunet_ssl.studies.figures import draw_fractions, draw_heat_map, draw_intervals

    summary, tests = summarize_cells(study, experiment, cases), compare_rows(study, experiment, cases)
    write_csv(summary, out / f"{name}.csv")
    write_csv(tests, out / f"{name}_tests.csv")
    text = segmentation_tables(study, experiment, summary, tests)
    pictures = []
    if len(summary) and len(experiment.fractions) > 1:
        pictures.append(out / f"{name}_fractions.png")
        draw_fractions(study, experiment, summary, pictures[-1])
    if len(summary) and len(experiment.datasets) > 1:
        pictures.append(out / f"{name}_modalities.png")
        title = f"{NAMES[experiment.metrics[0]]} at {max(experiment.fractions)} % of the training subjects"
        draw_heat_map(heat_map(study, experiment, summary), pictures[-1], title)
    if len(summary) and len(experiment.fractions) == 1:
        pictures.append(out / f"{name}_intervals.png")
        draw_intervals(cell_intervals(study, experiment, summary), pictures[-1])
    if len(tests):
        pictures.append(out / f"{name}_differences.png")
        draw_intervals(difference_intervals(study, experiment, tests), pictures[-1], reference=0)
    return text + [line for path in pictures for line in _picture(experiment, path)]


def _figures(study: Study, name: str, experiment: Experiment, folder: Path, out: Path) -> list[str]:
    from nnunet_ssl.studies.figures import draw_intervals

    figures = read_figures(study, experiment, folder)
    summary, tests = summarize_figures(figures), compare_figures(experiment, figures)
    write_csv(figures, out / f"{name}_seeds.csv")
    write_csv(summary, out / f"{name}.csv")
    write_csv(tests, out / f"{name}_tests.csv")
    text = figure_tables(study, experiment, summary, tests)
    if not len(summary):
        return text
    table = summary.rename(columns={"figure": "panel"})
    draw_intervals(
        table.assign(row=[study.arms[arm].label for arm in table["arm"]]), picture := out / f"{name}_intervals.png"
    )
    return [*text, *_picture(experiment, picture)]


def _gradient_picture(study: Study, name: str, experiment: Experiment, gradients: pd.DataFrame, out: Path) -> list[str]:
    from nnunet_ssl.studies.figures import draw_dominance

    if not len(gradients):
        return []
    picture = out / f"{name}.png"
    draw_dominance({arm: study.arms[arm].label for arm in experiment.arms}, gradients, picture)
    return _picture(experiment, picture)


def _picture(experiment: Experiment, path: Path) -> list[str]:
    return [f"![{experiment.title}]({path.name})", ""]
