"""Which branch of a pre-training moves the encoder: the norms of the branches' gradients and the angles between them.

Read from the ``progress.csv`` that a pre-training writes, in which a row holds means over an interval of steps. Norms
are those of the weighted losses, before balancing and clipping.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.results import read_table
from nnunet_ssl.pretraining.gradients import COSINE, PREFIX, balance_columns, branch_names

FILE = "progress.csv"


@dataclass(frozen=True)
class BranchGradients:
    """What a pre-training recorded of its branches' gradients, by step.

    Attributes:
        norms: a column for each branch.
        pairs: for each two branches, called ``a/b``: ``ratio``, the norm of a over that of b; ``balanced``, the same
            after balancing; ``cosine``, NaN where it was not recorded.
    """

    norms: pd.DataFrame
    pairs: dict[str, pd.DataFrame]


def read_runs(paths: Sequence[Path]) -> dict[str, BranchGradients]:
    """Read what pre-trainings recorded of their gradients.

    Args:
        paths: folders of runs, or CSV files.

    Returns:
        by run: its folder's name, with as many parents as tell it from the others.

    Raises:
        UserError: a file is missing or holds no norm of a branch.
    """
    files = [path / FILE if path.is_dir() else path for path in paths]
    return dict(zip(_names([file.absolute().parent for file in files]), map(_read, files), strict=True))


def measure_gradients(runs: dict[str, BranchGradients]) -> dict[str, Any]:
    """Summarise each run; see ``docs/reference/scores.md``."""
    return {"runs": {name: _measure(run) for name, run in runs.items()}}


def describe_gradients(result: dict[str, Any]) -> str:
    """Write the result as the tables that the command prints: norms by branch, then what two branches do together."""
    norms = {
        name: {"steps": f"{run['steps']}"} | {branch: _spread(one) for branch, one in run["branches"].items()}
        for name, run in result["runs"].items()
    }
    pairs = {
        (name, pair): {
            "ratio": _spread(one["ratio"]),
            "above 1": _number(one["dominated"], "{:.0%}"),
            "after balancing": _spread(one["balanced"]),
            "cosine": _number(one["cosine"]["mean"], "{:+.3f}"),
            "opposed": _number(one["opposed"], "{:.0%}"),
        }
        for name, run in result["runs"].items()
        for pair, one in run["pairs"].items()
    }
    text = "gradient norms on the shared encoder, median [quartiles]\n" + _table(norms)
    if pairs:
        text += "\n\nof two branches; opposed: share of rows with a negative cosine\n" + _table(pairs)
    return text


def _read(file: Path) -> BranchGradients:
    if not file.is_file():
        raise UserError(f"There is no {file}: name the folder of a pre-training, or its {FILE}.")
    table = read_table(file)
    branches = branch_names(table.columns)
    if "step" not in table or not branches:
        raise UserError(
            f"{file} has no column {PREFIX}contrastive, {PREFIX}masked or of another branch. A pre-training records "
            "the norm of each branch when gradients_every is above 0."
        )
    norms = [f"{PREFIX}{branch}" for branch in branches]
    rows = table.filter(regex=f"^(step$|{PREFIX})").dropna(subset=norms, how="all").set_index("step")
    if rows.empty:
        raise UserError(f"{file} has no row with the norm of a branch yet.")
    if not all(map(pd.api.types.is_numeric_dtype, [rows.index.dtype, *rows.dtypes])):
        raise UserError(f"{file} has text where step and gradients are numbers: it is damaged or no {FILE}.")
    pairs = itertools.combinations(branches, 2)
    return BranchGradients(
        norms=rows[norms].set_axis(branches, axis=1), pairs={f"{a}/{b}": _pair(rows, a, b) for a, b in pairs}
    )


def _pair(rows: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """What a run recorded of two branches. A run of two has one cosine, which bears no names."""
    ratio = rows[f"{PREFIX}{first}"] / rows[f"{PREFIX}{second}"]
    cosines = [f"{COSINE}/{first}-{second}", f"{COSINE}/{second}-{first}", COSINE]
    cosine = next((rows[name] for name in cosines if name in rows), np.nan)
    balanced = ratio * _factor(rows, first) / _factor(rows, second)
    return pd.DataFrame({"ratio": ratio, "balanced": balanced, "cosine": cosine}, index=rows.index)


def _factor(rows: pd.DataFrame, branch: str) -> pd.Series:
    """By how much balancing scaled a branch; 1 where it was not balanced."""
    column = next((name for name in balance_columns(branch) if name in rows), None)
    return rows[column].fillna(1.0) if column else pd.Series(1.0, rows.index)


def _measure(run: BranchGradients) -> dict[str, Any]:
    return {
        "steps": int(run.norms.index.max()),
        "n_rows": len(run.norms),
        "branches": {branch: _quartiles(values) for branch, values in run.norms.items()},
        "pairs": {
            name: {
                "ratio": _quartiles(pair["ratio"]),
                "balanced": _quartiles(pair["balanced"]),
                "dominated": _share(pair["ratio"].dropna() > 1),
                "cosine": {"mean": pair["cosine"].mean(), **_quartiles(pair["cosine"])},
                "opposed": _share(pair["cosine"].dropna() < 0),
            }
            for name, pair in run.pairs.items()
        },
    }


def _quartiles(values: pd.Series) -> dict[str, Any]:
    low, median, high = values.quantile([0.25, 0.5, 0.75])
    return {"median": median, "quartiles": [low, high]}


def _share(holds: pd.Series) -> float:
    return float(holds.mean()) if len(holds) else float("nan")


def _names(folders: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError("The same run is named twice.")


def _table(rows: dict[Any, dict[str, str]]) -> str:
    return pd.DataFrame.from_dict(rows, orient="index").fillna("-").to_string()


def _spread(entry: dict[str, Any]) -> str:
    low, high = entry["quartiles"]
    return "-" if np.isnan(entry["median"]) else f"{entry['median']:.3g} [{low:.3g}, {high:.3g}]"


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else form.format(value)
