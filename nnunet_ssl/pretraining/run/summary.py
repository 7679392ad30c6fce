"""report.html: what a run did, what came of it and what it cost, for whoever looks at it later or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ssl.corpus.prepared import describe_corpus
from nnunet_ssl.pages import write_page
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.run.records import CSV, PLOT

PAGE = "report.html"

SHOWN = {
    "validation/cross_modality_distance": "cross-modality distance (held out; lower: a subject's modalities agree)",
    "validation/cross_subject_distance": "cross-subject distance (held out; near 0: collapsed)",
    "gradient/total": "norm of the gradient",
    "memory/peak_gib": "peak memory (GiB)",
    "nonfinite_steps": "steps skipped, not finite",
}


def write_summary(folder: Path, config: PretrainingConfig, about: Mapping[str, Any], processes: int) -> None:
    """Write the report of a run from what it left in `folder`: progress.csv, without which there is none, and pictures.

    Args:
        about: what :func:`nnunet_ssl.pretraining.run.outputs.description` says.
        processes: that share the work, a GPU each.
    """
    if not (folder / CSV).is_file():
        return
    table = pd.read_csv(folder / CSV)
    done = int(table["step"].iat[-1])
    hours = training_hours(table)
    parts = [
        f"# {config.recipe}: step {done:,} of {config.steps:,}",
        f"Corpus:\n\n```text\n{describe_corpus(about['corpus'])}\n```",
        f"**Cost so far**: {hours:.2g} hours of training on {processes} process(es), {hours * processes:.2g} device "
        "hours (without validation and checkpoints).",
        _figures(table),
    ]
    pictures = sorted(folder.glob("[!.]*.png"), key=lambda path: (path.name != PLOT, path.name))
    parts += [f"## {path.stem.replace('_', ' ').capitalize()}\n\n![{path.stem}]({path.name})" for path in pictures]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    parts += [
        f"## Settings\n\n{versions}\n\n```yaml\n{config.as_yaml()}```",
        "## Please cite\n\n" + "\n".join(f"- {text}" for text in about["citations"]),
    ]
    write_page(folder / PAGE, "\n\n".join(parts), f"{config.recipe}, step {done:,}")


def training_hours(table: pd.DataFrame) -> float:
    """The hours behind a run's rows: their steps by their speed."""
    rows = table.dropna(subset=["speed/steps_per_second"]) if "speed/steps_per_second" in table else table.iloc[:0]
    steps = table["step"].diff().fillna(table["step"])
    return float((steps[rows.index] / rows["speed/steps_per_second"]).sum() / 3600) if len(rows) else 0.0


def _figures(table: pd.DataFrame) -> str:
    """The losses and what else matters, at the first and the last step that has them."""
    names = [name for name in table if name.startswith(("loss/", "validation/loss/"))] + list(SHOWN)
    lines = ["| | first | last |", "|---|---|---|"]
    for name in names:
        values = table[name].dropna() if name in table else pd.Series(dtype=float)
        if len(values):
            lines.append(f"| {SHOWN.get(name, name)} | {values.iloc[0]:.4g} | {values.iloc[-1]:.4g} |")
    return "## Figures\n\n" + "\n".join(lines)
