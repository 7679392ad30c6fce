"""What the tables of a corpus say of its scans: participants.tsv, and FOMO's mapping.tsv and mri_info.tsv."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from nnunet_ssl.errors import UserError
from nnunet_ssl.participants import describe_partners, find_partners

KEYS = ["dataset", "participant_id", "session_id", "filename"]
"""The columns by which a corpus' tables speak of a scan."""

logger = logging.getLogger(__name__)


def with_tables(scans: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Add what FOMO's three tables beside the subjects or the data sets say; a table that is not there is left out."""
    keys = [key for key in KEYS if key in scans]
    scans = join_table(scans, root / "participants.tsv", keys[:-1])
    for table in ("mapping", "mri_info"):
        scans = join_table(scans, root / f"{table}.tsv", keys)
    return scans


def join_table(scans: pd.DataFrame, table: Path, on: Sequence[str]) -> pd.DataFrame:
    """Add what a TSV says of the scans, except columns they have; session and file count where the TSV has them.

    Rows find their scans by :func:`find_partners`. The log tells what found no partner.

    Raises:
        UserError: the file is no table.
    """
    if not table.is_file():
        return scans
    content = _read_table(table).rename(columns={"new_filename": "filename"})
    missing = {"dataset", "participant_id"} & set(on) - set(content)
    if missing:
        logger.warning("%s is not used: it has no column %s.", table, " and no ".join(sorted(missing)))
        return scans
    on = [key for key in on if key in content]
    if "filename" in on:
        content["filename"] = content["filename"].str.replace(r"^.*/|\.nii(\.gz)?$", "", regex=True)
    new = content.columns.difference([*scans.columns, *KEYS[1:]], sort=False)
    content = _named_as(scans, content, on, table)[[*on, *new]].replace("n/a", "")
    return scans.merge(content, how="left", on=on).fillna(dict.fromkeys(new, ""))


def _named_as(scans: pd.DataFrame, content: pd.DataFrame, on: list[str], table: Path) -> pd.DataFrame:
    """The rows of a table that speak of scans, one of each name, by the names of the scans."""
    rows = list(content[on].itertuples(index=False, name=None))
    partners = find_partners(rows, scans[on].itertuples(index=False, name=None))
    names = pd.DataFrame([partners.get(row, (None,) * len(on)) for row in rows], index=content.index, columns=on)
    subject = [key for key in ("dataset", "participant_id") if key in on]
    found = set(names[subject].itertuples(index=False, name=None))
    lonely = {"/".join(key) for key in scans[subject].itertuples(index=False, name=None) if key not in found}
    clauses = [describe_partners(rows, partners, lonely)]
    named = content.assign(**names)[names[on[0]].notna()]
    repeated = named.drop_duplicates().duplicated(on).sum()
    if repeated:
        clauses.append(f"{repeated} rows contradict an earlier one of the same name, which counts")
    if any(clauses):
        level = logging.WARNING if lonely or repeated else logging.INFO
        logger.log(level, "%s: %s.", table, "; ".join(filter(None, clauses)))
    return named.drop_duplicates(on)


def _read_table(table: Path) -> pd.DataFrame:
    try:
        content = pd.read_csv(
            table, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8-sig", encoding_errors="replace"
        )
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except pd.errors.ParserError as error:
        raise UserError(
            f"{table} is no table of tab-separated values ({str(error).strip()}). Mend it, or move it away."
        ) from error
    content = content.rename(columns=str.strip)
    keys = content.columns.intersection([*KEYS, "new_filename"])
    return content.assign(**{key: content[key].str.strip() for key in keys})
