"""Enter a corpus into nnU-Net's raw folder: a dataset.json and a manifest; the images stay where they are."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from nnunet_ssl.corpus.layouts import detect_layout, find_scans
from nnunet_ssl.corpus.unused import describe_unused, unused_images
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.nnunet_folders import new_dataset_folder

TEST_SETS = {"ds004199": ("bonn", "Bonn FCD-II, which Dataset503_FCDBonn fine-tunes and tests on")}
"""Data that this project tests on and must not pre-train on: OpenNeuro's accession number, a word in its name, what."""

UNUSED = "unused.txt"

EXCLUSIONS = "exclusions"
"""The folder beside a manifest whose text files name what `nnssl_prepare` leaves out; `nnssl_audit` writes into it."""

logger = logging.getLogger(__name__)


def index_corpus(
    source: Path, dataset_id: int, name: str, *, layout: str = "auto", exclude: Sequence[str] = ()
) -> tuple[Path, pd.DataFrame]:
    """Write `$nnUNet_raw/DatasetXXX_NAME/{dataset.json, manifest.tsv, unused.txt}` for the corpus at `source`.

    Subjects of the :data:`TEST_SETS` are left out, and the log says so. It also counts the images that lie where the
    layout has no place for them; they are listed in unused.txt.

    Args:
        source: the corpus' folder, or nnssl's JSON file.
        dataset_id: nnU-Net's number for it.
        name: what follows the number in the data set's folder name.
        layout: see :func:`nnunet_ssl.corpus.layouts.find_scans`.
        exclude: names (shell wildcards allowed) of datasets, subjects, sessions or scans to leave out.

    Returns:
        The data set's folder and its manifest.

    Raises:
        UserError: see :func:`find_scans`; or nothing is left, two scans have one name, or the number belongs to
            another data set.
    """
    folder = new_dataset_folder(dataset_id, name)
    source = source.expanduser()
    found = find_scans(source, layout)
    unused = _unused(source, layout, found["path"])
    scans = without_test_sets(without(found, exclude))
    if scans.empty:
        raise UserError(f"Every scan of {source} is excluded; nothing is left to index.")
    _check_names(scans)
    description = {
        "name": name,
        "description": f"Unlabelled brain MRI for pre-training; {len(scans)} scans indexed from {source}",
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0},
        "numTraining": len(scans),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    with written_beside(folder / "dataset.json") as path:
        path.write_text(json.dumps(description, indent=4))
    with written_beside(folder / "manifest.tsv") as path:
        scans.to_csv(path, sep="\t", index=False)
    with written_beside(folder / UNUSED) as path:
        path.write_text("".join(f"{name}\n" for name in unused))
    if unused:
        logger.warning("%s. The whole list: %s", describe_unused(unused), folder / UNUSED)
    return folder, scans


def _unused(source: Path, layout: str, used: Iterable[str]) -> list[str]:
    """The images that the layout has no place for; nnssl's file names its images, and the others are not meant."""
    if (detect_layout(source) if layout == "auto" else layout) == "nnssl":
        return []
    return unused_images(source, used)


def _check_names(scans: pd.DataFrame) -> None:
    twins = scans[scans["scan_id"].duplicated(keep=False)].sort_values("scan_id", kind="stable")
    if not twins.empty:
        raise UserError(
            f"Two scans must not have one name: {twins['scan_id'].iloc[0]} stands for "
            f"{' and '.join(twins['path'].iloc[:2])} ({twins['scan_id'].nunique()} such names in all). Rename one of "
            "each, or leave out its path with --exclude."
        )


def read_index(raw: Path) -> pd.DataFrame:
    """Read the manifest that :func:`index_corpus` wrote, all columns as strings.

    Raises:
        UserError: there is none.
    """
    path = raw / "manifest.tsv"
    if not path.is_file():
        raise UserError(
            f"{raw} has no manifest.tsv, so it is no corpus for pre-training. Index one first: "
            "python dataset_conversion/Dataset500_FOMO60K.py -i DIR"
        )
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def standing_exclusions(raw: Path) -> list[str]:
    """Return the names in all files of the folder :data:`EXCLUSIONS` of an indexed corpus."""
    files = sorted((raw / EXCLUSIONS).glob("[!.]*.txt"))
    return list(dict.fromkeys(name for file in files for name in read_exclusions(file)))


def read_exclusions(path: Path) -> list[str]:
    """Read a list of names, one a line; empty lines and what follows a ``#`` don't count."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def without(scans: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Leave out the scans whose dataset, subject, session, scan_id or path matches one of `names`."""
    columns = ["dataset", "subject", "session", "scan_id", "path"]
    excluded = pd.Series(False, index=scans.index)
    for name in names:
        if any(sign in name for sign in "*?["):
            pattern = fnmatch.translate(name)
            hit = scans[columns].apply(lambda column, pattern=pattern: column.str.match(pattern)).any(axis=1)
        else:
            hit = (scans[columns] == name).any(axis=1)
        if not hit.any():
            logger.warning("The exclusion '%s' matches no dataset, subject, session, scan or path.", name)
        excluded |= hit
    if names:
        logger.info("Excluded as asked: %s of %s scans.", f"{excluded.sum():,}", f"{len(scans):,}")
    return scans[~excluded].reset_index(drop=True)


def without_test_sets(scans: pd.DataFrame) -> pd.DataFrame:
    """Leave out every subject with a scan that comes from one of the :data:`TEST_SETS`, by its name or its paths."""
    origins = [name for name in ("dataset", "dataset_doi", "path", "original_path", "old_path") if name in scans]
    for accession, (word, description) in TEST_SETS.items():
        hit = scans["dataset"].str.contains(word, case=False, regex=False)
        for column in origins:
            hit |= scans[column].str.contains(accession, case=False, regex=False)
        subjects = scans.loc[hit, "subject"].unique()
        if len(subjects):
            logger.warning(
                "Excluded: %d subjects of %s (%s). Pre-training must not see a test set.",
                len(subjects), accession, description,
            )  # fmt: skip
            scans = scans[~scans["subject"].isin(subjects)]
    return scans.reset_index(drop=True)
