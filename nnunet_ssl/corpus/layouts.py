"""Find the scans of a corpus on disk: FOMO's two layouts, BIDS trees, nnssl's pretrain_data.json.

Every reader returns a table with one row per scan file and the columns :data:`COLUMNS`, followed by what the corpus'
own tables say of the scan. No image is opened, so an index of 100,000 scans is a matter of seconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ssl.corpus.modalities import UNKNOWN, is_derived, is_not_of_the_brain, modality_of
from nnunet_ssl.corpus.tables import KEYS, join_table, with_tables
from nnunet_ssl.errors import UserError

COLUMNS = ("scan_id", "dataset", "subject", "session", "modality", "repeat", "age", "sex", "path")
LAYOUTS = ("fomo", "bids", "nnssl")
NNSSL_FILE = "pretrain_data.json"

_FOUND = [name for name in COLUMNS if name not in ("age", "sex")]  # what the names of files and folders tell
IMAGE = re.compile(r"(?P<stem>[^.].*)\.nii(\.gz)?$", re.IGNORECASE)
_REPEATED = re.compile(r"(?P<name>.+)_(?P<repeat>\d+)")
_BIDS_FOLDERS = ("anat", "dwi", "swi")
_SINGLE_SESSION = "ses-1"

logger = logging.getLogger(__name__)


def find_scans(source: Path, layout: str = "auto") -> pd.DataFrame:
    """List the scans of the corpus at `source`, sorted by path.

    Args:
        source: a folder, or nnssl's JSON file.
        layout: "fomo", "bids", "nnssl", or "auto" to tell by the names found.

    Raises:
        UserError: nothing is there, the layout cannot be told, no scan was found, or a table cannot be read.
    """
    source = Path(os.path.abspath(source.expanduser()))  # noqa: PTH100 (resolve() would follow links and lose names)
    if not source.exists():
        raise UserError(f"{source} does not exist.")
    layout = detect_layout(source) if layout == "auto" else layout
    scans = {"fomo": _read_fomo, "bids": _read_bids, "nnssl": _read_nnssl}[layout](source)
    if scans.empty:
        raise UserError(f"No .nii or .nii.gz file was found in {source}, read as layout '{layout}'.")
    if layout != "nnssl":  # which lists its scans and keeps masks apart
        scans = _without_derived(scans)
    if scans.empty:
        raise UserError(f"No scan was found in {source}, read as layout '{layout}': only label maps and the like.")
    scans = scans.sort_values("path", kind="stable", ignore_index=True)
    scans["scan_id"] = scans["scan_id"].map(_file_name)
    return scans[[*COLUMNS, *scans.columns.difference(COLUMNS, sort=False)]]


def _without_derived(scans: pd.DataFrame) -> pd.DataFrame:
    """Leave out what is no scan by its name, and say so."""
    stems = scans["path"].map(lambda path: match["stem"] if (match := IMAGE.match(Path(path).name)) else "")
    derived = stems.map(is_derived).astype(bool)
    if derived.any():
        example = scans.loc[derived, "path"].iloc[0]
        logger.info("Left out: %d label maps and other derived files, such as %s.", derived.sum(), example)
    return scans[~derived]


def detect_layout(source: Path) -> str:
    """Tell the layout of a corpus by the names in its top folder and one level below.

    Raises:
        UserError: the names fit no layout.
    """
    if source.suffix == ".json" or (source / NNSSL_FILE).is_file():
        return "nnssl"
    if _roots(source, "sub_"):
        return "fomo"
    if _roots(source, "sub-"):
        return "bids"
    raise UserError(
        f"The layout of {source} is none of those known: no {NNSSL_FILE} (nnssl), no folder sub_* (FOMO) and no folder "
        "sub-* (BIDS), neither there nor one level below. Point -i at the folder that holds them, or convert to BIDS."
    )


def _read_fomo(root: Path) -> pd.DataFrame:
    """Read FOMO's layouts: `[<dataset>/]sub_*/ses_*/*.nii.gz`, with participants, mapping and mri_info tables beside.

    Without dataset folders (the flat layout) a scan's dataset is what the tables say, or else the name of `root`.
    """
    rows = []
    for dataset in _roots(root, "sub_"):
        for subject in _folders(dataset, "sub_"):
            for session in _folders(subject, "ses_"):
                for file, stem in _images(session):
                    repeated = _REPEATED.fullmatch(stem)
                    rows.append(
                        {
                            "scan_id": f"{dataset.name}__{subject.name}__{session.name}__{stem}",
                            "dataset": dataset.name,
                            "participant_id": subject.name,
                            "session_id": session.name,
                            "filename": stem,
                            "subject": f"{dataset.name}/{subject.name}",
                            "session": f"{dataset.name}/{subject.name}/{session.name}",
                            "modality": modality_of(repeated["name"] if repeated else stem),
                            "repeat": int(repeated["repeat"]) if repeated else 1,
                            "path": str(file),
                        }
                    )
    scans = pd.DataFrame(rows, columns=[*_FOUND, *KEYS[1:]])
    if _roots(root, "sub_") == [root]:
        scans = with_tables(scans.drop(columns="dataset"), root)
        scans = scans.assign(dataset=scans["dataset"].replace("", root.name) if "dataset" in scans else root.name)
    else:
        scans = with_tables(scans, root)
    return _with_age_and_sex(scans.drop(columns=KEYS[1:]))


def _read_bids(root: Path) -> pd.DataFrame:
    """Read BIDS trees (`root` is one, or holds several): `sub-*/[ses-*/]{anat,dwi,swi}/*.nii.gz`, no derivatives.

    FOMO300K is of this kind; beside its trees lie tables for all of them, as in the older releases.
    """
    trees = _roots(root, "sub-")
    if not trees:
        return pd.DataFrame(columns=COLUMNS)
    scans = pd.concat([_read_bids_tree(tree) for tree in trees], ignore_index=True).fillna("")
    if trees != [root]:
        scans = with_tables(scans, root)
    return _with_age_and_sex(scans.drop(columns=KEYS[1:]))


def _read_bids_tree(root: Path) -> pd.DataFrame:
    rows = []
    for subject in _folders(root, "sub-"):
        for session in _folders(subject, "ses-") or [subject]:
            session_id = _SINGLE_SESSION if session is subject else session.name
            repeats: dict[str, int] = {}
            for folder in _BIDS_FOLDERS:
                for file, stem in _images(session / folder):
                    modality = _bids_modality(file, stem)
                    repeats[modality] = repeats.get(modality, 0) + 1
                    rows.append(
                        {
                            "scan_id": f"{root.name}__{subject.name}__{session_id}__{stem}",
                            "dataset": root.name,
                            "participant_id": subject.name,
                            "session_id": session_id,
                            "filename": stem,
                            "subject": f"{root.name}/{subject.name}",
                            "session": f"{root.name}/{subject.name}/{session_id}",
                            "modality": modality,
                            "repeat": repeats[modality],
                            "path": str(file),
                        }
                    )
    scans = pd.DataFrame(rows, columns=[*_FOUND, *KEYS[1:]])
    return join_table(scans, root / "participants.tsv", ["participant_id"]).assign(dataset_doi=_bids_doi(root))


def _bids_doi(root: Path) -> str:
    try:
        return str(json.loads((root / "dataset_description.json").read_text())["DatasetDOI"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _bids_modality(file: Path, stem: str) -> str:
    """`sub-1_ce-gad_T1w` -> "t1c". What has the suffix of a contrast and another look is "unknown": a phase or complex
    part, one inversion of an MP2RAGE (its T1-weighted image is UNIT1), another part of the body."""
    entities = dict(part.split("-", 1) for part in stem.split("_") if "-" in part)
    modality = modality_of(stem.rpartition("_")[2])
    if entities.get("part", "mag") != "mag" or ("inv" in entities and not stem.endswith("UNIT1")):
        return UNKNOWN
    words = "_".join(part for part in stem.split("_") if not part.startswith(("sub-", "ses-")))
    if modality != UNKNOWN and (is_not_of_the_brain(words) or is_not_of_the_brain(_body_part(file, stem))):
        return UNKNOWN
    return "t1c" if modality == "t1" and "ce" in entities else modality


def _body_part(file: Path, stem: str) -> str:
    """What the JSON file beside a scan says of the part of the body; "" if it says nothing."""
    try:
        return str(json.loads(file.with_name(f"{stem}.json").read_text()).get("BodyPartExamined", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _read_nnssl(source: Path) -> pd.DataFrame:
    """Read nnssl's collection file; image paths may start with an environment variable (`$ENV_VAR/...`)."""
    file = source if source.is_file() else source / NNSSL_FILE
    try:
        collection = json.loads(file.read_text())
        rows = list(_nnssl_rows(collection["datasets"], file.parent))
    except (OSError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is not a collection as nnssl writes it ({type(error).__name__}: {error}).") from error
    return pd.DataFrame(rows, columns=COLUMNS)


def _nnssl_rows(datasets: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    for dataset, content in datasets.items():
        for subject, person in content["subjects"].items():
            information = person.get("subject_info") or {}
            for session, visit in person["sessions"].items():
                repeats: dict[str, int] = {}
                for image in visit["images"]:
                    modality = modality_of(str(image.get("modality") or ""))
                    repeats[modality] = repeats.get(modality, 0) + 1
                    stem = re.sub(r"\.nii(\.gz)?$", "", image["name"], flags=re.IGNORECASE)
                    yield {
                        "scan_id": f"{dataset}__{subject}__{session}__{stem}",
                        "dataset": dataset,
                        "subject": f"{dataset}/{subject}",
                        "session": f"{dataset}/{subject}/{session}",
                        "modality": modality,
                        "repeat": repeats[modality],
                        "age": _known(information.get("age")),
                        "sex": _known(information.get("sex")),
                        "path": _expanded(image["image_path"], folder),
                    }


def _expanded(path: str, folder: Path) -> str:
    expanded = os.path.expandvars(path)
    if expanded.startswith("$"):
        variable = re.split(r"[/\\]", expanded)[0]
        raise UserError(f"An image path starts with {variable} ({path}), but that environment variable is not set.")
    return str(folder / expanded)


def _roots(source: Path, prefix: str) -> list[Path]:
    """The folders that hold subject folders: `source` itself, or else those of its children that do."""
    if not source.is_dir():
        return []
    if _folders(source, prefix):
        return [source]
    return [child for child in _folders(source, "") if _folders(child, prefix)]


def _folders(parent: Path, prefix: str) -> list[Path]:
    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if entry.name.lower().startswith(prefix) and entry.is_dir()]
    return [parent / name for name in sorted(names) if not name.startswith(".")]


def _images(folder: Path) -> list[tuple[Path, str]]:
    """The NIfTI files of a folder with their stems. Dangling links are listed too: preparation reports them missing."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []
    return [(folder / name, match["stem"]) for name in names if (match := IMAGE.match(name))]


def _with_age_and_sex(scans: pd.DataFrame) -> pd.DataFrame:
    missing = {name: "" for name in ("age", "sex") if name not in scans}
    return scans.assign(**missing)


def _known(value: Any) -> str:
    return "" if value is None or value == "n/a" else str(value)


def _file_name(scan_id: str) -> str:
    """Make a scan's name safe for a file; nnU-Net reads a name that ends in "_seg" as a segmentation."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", scan_id)
    return f"{name}_scan" if name.endswith("_seg") else name
