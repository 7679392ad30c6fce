"""Tables as Markdown, ready for the docs (pandas' own writer needs a further package)."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd


def markdown(table: pd.DataFrame, decimals: int) -> str:
    """Write a table without its index; numbers with so many decimals, nothing where a figure is missing."""

    def cells(values: Iterable[object]) -> str:
        texts = (f"{value:.{decimals}f}" if isinstance(value, float) else str(value) for value in values)
        return "| " + " | ".join(text.replace("nan", "") for text in texts) + " |"

    head = [cells(table.columns), "|" + "---|" * len(table.columns)]
    return "\n".join(head + [cells(row) for row in table.itertuples(index=False)])
