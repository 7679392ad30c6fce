"""Which branch of a pre-training moves the encoder: the norms of the branches' gradients and the angles between them.

Read from the ``progress.csv`` that a pre-training writes, in which a row holds means over an interval of steps. Norms
are those of the weighted losses, before balancing and clipping; on the whole encoder, and, since it is written, at each
of its depths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.results import read_table
from nnunet_ssl.evaluation.statistics import t_interval
from nnunet_ssl.pretraining.gradients import PREFIX, balance_columns, branch_names, depth_prefixes

FILE = "progress.csv"

ENCODER = "encoder"
"""In place of a depth: the whole encoder."""
PARTS = ("whole", "first third", "second third", "last third")
"""Of a training, by steps."""
BOUNDS = {"ratio": (0, np.inf), "cosine": (-1, 1), "opposed": (0, 1)}
"""What seeds are summarised by, and between which numbers it lies."""


@dataclass(frozen=True)
class BranchGradients:
    """What a pre-training recorded of its branches' gradients, by step.

    Attributes:
        norms: a column for each branch.
        pairs: for each two branches, called ``a/b``: ``ratio``, the norm of a over that of b; ``balanced``, the same
            after balancing; ``cosine``, NaN where it was not recorded or one of the two has no gradient.
        depths: the same by depth of the encoder, finest first; empty where a run did not record it.
    """

    norms: pd.DataFrame
    pairs: dict[str, pd.DataFrame]
    depths: dict[str, BranchGradients] = field(default_factory=dict)

    @property
    def shares(self) -> pd.DataFrame:
        """The norm of each branch over the sum of all branches' norms."""
        return self.norms.div(self.norms.sum(axis=1), axis=0)


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
    depths = {
        (name, depth): _describe_depth(one)
        for name, run in result["runs"].items()
        for depth, one in run["depths"].items()
    }
    if depths:
        text += "\n\nby depth, finest first; share: of the sum of the branches' norms, median\n" + _table(depths)
    return text


def _describe_depth(depth: dict[str, Any]) -> dict[str, str]:
    described = {f"share of {branch}": _number(one["share"], "{:.0%}") for branch, one in depth["branches"].items()}
    for pair, one in depth["pairs"].items():
        of_pair = f" of {pair}" if len(depth["pairs"]) > 1 else ""
        described[f"cosine{of_pair}"] = _number(one["cosine"]["mean"], "{:+.3f}")
        described[f"opposed{of_pair}"] = _number(one["opposed"], "{:.0%}")
    return described


def summarise_seeds(runs: Sequence[BranchGradients]) -> pd.DataFrame:
    """The branches of one arm over its seeds: does one outweigh the other (ratio far from 1), and do they agree,
    ignore (cosine about 0: no conflict) or oppose each other (cosine below 0)?

    Args:
        runs: pre-trainings that differ in their seed alone.

    Returns:
        a row for each of

        - depth: :data:`ENCODER`, then the encoder's depths, finest first;
        - pair: two branches, ``a/b``;
        - part: of the training, one of :data:`PARTS`;
        - quantity: ``ratio``, the median over rows of the norm of a over that of b, before balancing; ``cosine``, its
          mean over rows; ``opposed``, the share of rows with a negative cosine;

        with mean, low, high (95 %, :func:`nnunet_ssl.evaluation.statistics.t_interval` over runs, cut to what is
        possible) and n_runs, those in which there is a value. Ratios are taken on a log scale, so that a/b and b/a say
        the same: their mean is geometric. With fewer than two runs low and high are NaN.

    Raises:
        UserError: the runs have different branches or depths.
    """
    if len({tuple(run.pairs) for run in runs}) > 1 or len({tuple(run.depths) for run in runs if run.depths}) > 1:
        raise UserError("The runs have different branches or encoders: they are no seeds of one pre-training.")
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for run in runs:
        for depth, level in {ENCODER: run, **run.depths}.items():
            for pair, rows in level.pairs.items():
                for part, within in zip(PARTS, _parts(rows, run.norms.index.max()), strict=True):
                    for quantity, value in _of_a_seed(within).items():
                        values.setdefault((depth, pair, part, quantity), []).append(value)
    columns = ["depth", "pair", "part", "quantity", "mean", "low", "high", "n_runs"]
    return pd.DataFrame([[*key, *_over_seeds(key[-1], of_runs)] for key, of_runs in values.items()], columns=columns)


def _parts(rows: pd.DataFrame, last: int) -> list[pd.DataFrame]:
    """All rows, and those of each third of a training of `last` steps; a row stands for the steps up to its own."""
    third = np.ceil(3 * rows.index / last).to_numpy()
    return [rows, *(rows[third == number] for number in (1, 2, 3))]


def _of_a_seed(rows: pd.DataFrame) -> dict[str, float]:
    ratio = rows["ratio"].where(rows["ratio"] > 0)
    cosine = rows["cosine"].dropna()
    return {"ratio": np.exp(np.log(ratio).median()), "cosine": cosine.mean(), "opposed": _share(cosine < 0)}


def _over_seeds(quantity: str, values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, interval and number of the values that there are."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return float("nan"), float("nan"), float("nan"), 0
    scaled = np.log(known) if quantity == "ratio" else known
    figures = np.array([scaled.mean(), *t_interval(scaled)])
    mean, low, high = np.clip(np.exp(figures) if quantity == "ratio" else figures, *BOUNDS[quantity]).tolist()
    return mean, low, high, len(known)


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
    depths = {depth: _level(rows, branches, prefix) for depth, prefix in depth_prefixes(rows.columns).items()}
    return replace(_level(rows, branches, PREFIX), depths=depths)


def _level(rows: pd.DataFrame, branches: Sequence[str], prefix: str) -> BranchGradients:
    """What the columns that begin with `prefix` tell: of the whole encoder, or of one depth."""
    rows = rows.reindex(columns=rows.columns.union([f"{prefix}{branch}" for branch in branches]))
    pairs = {f"{a}/{b}": _pair(rows, a, b, prefix) for a, b in itertools.combinations(branches, 2)}
    norms = rows[[f"{prefix}{branch}" for branch in branches]].set_axis(branches, axis=1)
    return BranchGradients(norms=norms.dropna(how="all"), pairs=pairs)


def _pair(rows: pd.DataFrame, first: str, second: str, prefix: str) -> pd.DataFrame:
    """What a run recorded of two branches. A run of two has one cosine, which bears no names."""
    one, other = rows[f"{prefix}{first}"], rows[f"{prefix}{second}"]
    cosines = [f"{prefix}cosine/{first}-{second}", f"{prefix}cosine/{second}-{first}", f"{prefix}cosine"]
    cosine = next((rows[name] for name in cosines if name in rows), pd.Series(np.nan, rows.index))
    ratio = (one / other).where(other > 0)
    balanced = ratio * _factor(rows, first) / _factor(rows, second)
    both = (one > 0) & (other > 0)  # a gradient of zero has no direction, and its cosine is written as 0
    return pd.DataFrame({"ratio": ratio, "balanced": balanced, "cosine": cosine.where(both)}, index=rows.index)


def _factor(rows: pd.DataFrame, branch: str) -> pd.Series:
    """By how much balancing scaled a branch; 1 where it was not balanced."""
    column = next((name for name in balance_columns(branch) if name in rows), None)
    return rows[column].fillna(1.0) if column else pd.Series(1.0, rows.index)


def _measure(run: BranchGradients) -> dict[str, Any]:
    return {
        "steps": int(run.norms.index.max()),
        "n_rows": len(run.norms),
        **_measure_level(run),
        "depths": {depth: _measure_level(level) for depth, level in run.depths.items()},
    }


def _measure_level(run: BranchGradients) -> dict[str, Any]:
    return {
        "branches": {
            branch: {**_quartiles(values), "share": run.shares[branch].median()} for branch, values in run.norms.items()
        },
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
