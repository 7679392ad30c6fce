"""Rank several predictions of one data set as challenges do: case by case and metric by metric, then on average.

ISLES'26's design document: metrics are computed for each case and ranked one by one; the mean over the metrics is a
team's rank on the case, the mean over the cases its final rank. A missing result takes the worst rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.lesions import PRESETS
from nnunet_ssl.evaluation.segmentations import METRICS, NAMES
from nnunet_ssl.evaluation.statistics import mean_interval

BETTER_WHEN_SMALL = ("volume_difference_ml", "count_difference", "hd95_mm")


def read_predictions(folders: Sequence[Path]) -> tuple[dict[str, pd.DataFrame], str]:
    """Read what ``nnssl_evaluate lesions`` wrote.

    Args:
        folders: each with a ``lesions.json``, or that file itself.

    Returns:
        the cases of each prediction by its folder, one row a case with the case as index, and the preset of them all.

    Raises:
        UserError: fewer than two, or one twice; one can't be read; they were not measured alike, or have no case in
            common.
    """
    tables, measured = {}, {}
    for folder in folders:
        path = folder if folder.is_file() else folder / "lesions.json"
        try:
            content = json.loads(path.read_text())
            tables[str(folder)] = pd.DataFrame(content["cases"]).set_index("case")
            how = content["preset"], content["connectivity"], content.get("label"), content["surface_dice_tolerance_mm"]
            measured[str(folder)] = how
        except FileNotFoundError as error:
            raise UserError(f"There is no {path}: run nnssl_evaluate lesions on that prediction first.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not what nnssl_evaluate lesions writes ({error}).") from error
    if len(tables) < 2 or len(tables) < len(folders):
        raise UserError(
            f"A ranking needs at least two different predictions; given were {', '.join(map(str, folders))}."
        )
    (first, how), *others = measured.items()
    for other, differently in others:
        if differently[:2] != how[:2]:
            raise UserError(
                f"{first} was measured with preset {how[0]} and connectivity {how[1]}, {other} with {differently[0]} "
                f"and {differently[1]}. Measure both alike."
            )
        if differently != how:
            raise UserError(
                f"{first} was measured with label {how[2] or 'any'} and a tolerance of {how[3]} mm, {other} with "
                f"{differently[2] or 'any'} and {differently[3]} mm. Measure both alike."
            )
    if not set.intersection(*(set(table.index) for table in tables.values())):
        raise UserError(f"No case was predicted by all of {', '.join(tables)}: rank predictions of the same cases.")
    return tables, how[0]


def rank_cases(tables: Mapping[str, pd.DataFrame], metrics: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Rank the predictions on every case by every metric; 1 is best, and equals share the mean of their ranks.

    A case that one prediction lacks, or on which only its metric is missing, gives that prediction the worst rank,
    which is their number. A metric that no prediction has on a case (such as the detection of nothing) ranks nobody
    there.

    Returns:
        of each metric the ranks, one row a case, one column a prediction; nan where nobody is ranked.

    Raises:
        UserError: a metric that a prediction lacks in all cases, or does not know.
    """
    ranks = {}
    for metric in metrics:
        for name, table in tables.items():
            if metric not in table or table[metric].isna().all():
                raise UserError(f"{name} has no {NAMES[metric]}: measure it again with it, or choose other --metrics.")
        values = pd.DataFrame({name: table[metric].astype(np.float64) for name, table in tables.items()}).sort_index()
        order = values.rank(axis=1, ascending=metric in BETTER_WHEN_SMALL)
        ranks[metric] = order.fillna(len(tables)).where(values.notna().any(axis=1))
    return ranks


def rank(tables: Mapping[str, pd.DataFrame], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the final ranks, best first, with 95 % intervals bootstrapped over cases, and each metric's mean rank.

    Raises:
        UserError: as :func:`rank_cases`.
    """
    ranks = rank_cases(tables, metrics)
    by_case = pd.concat(ranks.values()).groupby(level=0).mean()
    predictions = [
        {
            "prediction": name,
            "rank": by_case[name].mean(),
            "interval": mean_interval(by_case[name].to_numpy()),
            "metrics": {metric: table[name].mean() for metric, table in ranks.items()},
            "missing_cases": len(by_case) - len(tables[name]),
        }
        for name in tables
    ]
    return {
        "n_cases": len(by_case),
        "metrics": list(metrics),
        "predictions": sorted(predictions, key=lambda entry: entry["rank"]),
    }


def official_metrics(preset: str, wanted: Sequence[str] | None) -> list[str]:
    """Return the metrics to rank by: those that are wanted, else the preset's official ones.

    Raises:
        UserError: there is no such metric.
    """
    unknown = [name for name in wanted or () if name not in METRICS]
    if unknown:
        raise UserError(f"There is no metric {unknown[0]}. Metrics: {', '.join(METRICS)}.")
    return list(wanted or PRESETS[preset].official)


def describe_ranking(result: Mapping[str, Any]) -> str:
    """Write the ranking as the lines that the command prints."""
    lines = [f"{result['n_cases']} cases; mean rank [95 % interval over cases], and by metric"]
    for entry in result["predictions"]:
        low, high = entry["interval"]
        parts = ", ".join(f"{NAMES[name]} {value:.2f}" for name, value in entry["metrics"].items())
        lines.append(f"{entry['rank']:6.3f} [{low:.3f}, {high:.3f}]  {entry['prediction']}  ({parts})")
        if entry["missing_cases"]:
            lines.append(f"       lacks {entry['missing_cases']} cases, where it takes the worst rank")
    return "\n".join(lines)
