"""Which branch of a pre-training moves the encoder: the norms of the branches' gradients and the angle between them.

Read from the ``progress.csv`` that a pre-training writes, in which a row holds means over an interval of steps. Norms
are those of the weighted losses, before balancing and clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.results import read_table

FILE = "progress.csv"
CONTRASTIVE, MASKED, COSINE, BALANCE = (f"gradient/{name}" for name in ("contrastive", "masked", "cosine", "balance"))


def read_runs(paths: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """Read what pre-trainings recorded of their gradients.

    Args:
        paths: folders of runs, or CSV files.

    Returns:
        by run (its folder's name, with as many parents as tell it from the others) the rows with a norm: ``step``,
        the columns above (NaN where a run has none), ``ratio`` (contrastive over masked) and ``balanced`` (the same
        after balancing).

    Raises:
        UserError: a file is missing or holds no norm of a branch.
    """
    files = [path / FILE if path.is_dir() else path for path in paths]
    return dict(zip(_names([file.absolute().parent for file in files]), map(_read, files), strict=True))


def measure_gradients(runs: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Summarise each run; see ``docs/evaluation.md``. Figures of a branch that a run lacks are nan."""
    return {"runs": {name: _measure(table) for name, table in runs.items()}}


def describe(result: dict[str, Any]) -> str:
    """Write the result as the table that the command prints."""
    rows = {
        name: {
            "steps": f"{run['steps']}",
            "contrastive": _spread(run["contrastive"]),
            "masked": _spread(run["masked"]),
            "ratio": _spread(run["ratio"]),
            "above 1": _number(run["dominated"], "{:.0%}"),
            "after balancing": _spread(run["balanced"]),
            "cosine": _number(run["cosine"]["mean"], "{:+.3f}"),
            "opposed": _number(run["opposed"], "{:.0%}"),
        }
        for name, run in result["runs"].items()
    }
    return (
        "gradient norms on the shared encoder, median [quartiles]; ratio: contrastive over masked; opposed: share of "
        "rows with a negative cosine\n" + pd.DataFrame.from_dict(rows, orient="index").to_string()
    )


def _read(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise UserError(f"There is no {file}: name the folder of a pre-training, or its {FILE}.")
    table = read_table(file)
    columns = [CONTRASTIVE, MASKED, COSINE, BALANCE]
    if "step" not in table or not {CONTRASTIVE, MASKED} & set(table.columns):
        raise UserError(
            f"{file} has no column {CONTRASTIVE} and no {MASKED}. A pre-training records the norm of each branch when "
            "gradients_every is above 0."
        )
    rows = table.reindex(columns=["step", *columns]).dropna(subset=[CONTRASTIVE, MASKED], how="all")
    if rows.empty:
        raise UserError(f"{file} has no row with the norm of a branch yet.")
    if not all(map(pd.api.types.is_numeric_dtype, rows.dtypes)):
        raise UserError(f"{file} has text where step and gradients are numbers: it is damaged or no {FILE}.")
    ratio = rows[CONTRASTIVE] / rows[MASKED]
    return rows.assign(ratio=ratio, balanced=ratio * rows[BALANCE].fillna(1.0)).reset_index(drop=True)


def _measure(table: pd.DataFrame) -> dict[str, Any]:
    return {
        "steps": int(table["step"].max()),
        "n_rows": len(table),
        "contrastive": _quartiles(table[CONTRASTIVE]),
        "masked": _quartiles(table[MASKED]),
        "ratio": _quartiles(table["ratio"]),
        "balanced": _quartiles(table["balanced"]),
        "dominated": _share(table["ratio"], lambda known: known > 1),
        "cosine": {"mean": table[COSINE].mean(), **_quartiles(table[COSINE])},
        "opposed": _share(table[COSINE], lambda known: known < 0),
    }


def _quartiles(values: pd.Series) -> dict[str, float]:
    low, median, high = values.quantile([0.25, 0.5, 0.75])
    return {"median": median, "quartiles": [low, high]}


def _share(values: pd.Series, holds: Callable[[pd.Series], pd.Series]) -> float:
    known = values.dropna()
    return float(holds(known).mean()) if len(known) else float("nan")


def _names(folders: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError("The same run is named twice.")


def _spread(entry: dict[str, Any]) -> str:
    low, high = entry["quartiles"]
    return "-" if np.isnan(entry["median"]) else f"{entry['median']:.3g} [{low:.3g}, {high:.3g}]"


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else form.format(value)
