"""Write what was measured, JSON that any parser reads and TSV that any table program reads; read such tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside


def json_text(result: Mapping[str, Any]) -> str:
    """Return `result` as JSON; numbers that do not exist (nan, infinite) become null, which the standard allows."""
    return json.dumps(_plain(result), indent=2, allow_nan=False) + "\n"


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write `result` as JSON (see :func:`json_text`)."""
    with written_beside(path) as temporary:
        temporary.write_text(json_text(result))


def write_tsv(table: pd.DataFrame, path: Path) -> None:
    """Write a table; what does not exist is written as n/a, as BIDS does."""
    with written_beside(path) as temporary:
        table.to_csv(temporary, sep="\t", index=False, na_rep="n/a", float_format="%.6g")


def read_table(path: Path, **options: Any) -> pd.DataFrame:
    """Read a table with the `options` of :func:`pandas.read_csv`.

    Raises:
        UserError: it holds none.
    """
    try:
        return pd.read_csv(path, **options)
    except ValueError as error:  # an empty file, lines of different length, bytes that are no text
        raise UserError(f"{path} cannot be read as a table: {str(error).strip()}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
