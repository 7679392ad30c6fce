"""What an audit compares: the scans of an indexed corpus, and the cases of a labelled data set of nnU-Net."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from nnunetv2.utilities.utils import (
    create_lists_from_splitted_dataset_folder,
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunet_ssl.audit.origins import Origin, words_of
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import RECORDS

_SUBJECT = re.compile(r"sub[-_]([A-Za-z0-9]+)")
_TELLING = re.compile(r"(?=.*[a-z])(?=(.*\d){3}).{6,}")
"""A name that two data sets do not share by chance: letters and three digits, as `r001s001`; not `01` nor `t1`."""

_PLACES = ("path", "original_path", "old_path")


@dataclass(frozen=True, kw_only=True)
class LabelledCase:
    """A case of a labelled data set: its images, and the files that it was converted from, where a record says so."""

    name: str
    images: tuple[Path, ...]
    sources: tuple[str, ...]

    @property
    def identifiers(self) -> set[str]:
        """The names that its subject may have elsewhere, in lower case."""
        return {self.name.lower()}.union(*(names_in(path) for path in (self.name, *self.sources)))

    @property
    def subject(self) -> str:
        """What its subject's sessions share of its name: the `sub-` entity, or else the name."""
        entity = _SUBJECT.match(self.name)
        return entity[1].lower() if entity else self.name.lower()


def labelled_cases(raw: Path) -> list[LabelledCase]:
    """Return the cases of a data set in `$nnUNet_raw`, for training and for testing.

    Raises:
        UserError: it has no dataset.json, or no image.
    """
    file = raw / "dataset.json"
    if not file.is_file():
        raise UserError(f"{raw} has no dataset.json, so it is no labelled data set of nnU-Net.")
    description = json.loads(file.read_text())
    ending = description.get("file_ending", ".nii.gz")
    images = {}
    if "dataset" in description or (raw / "imagesTr").is_dir():
        training = get_filenames_of_train_images_and_targets(str(raw), json.loads(file.read_text()))
        images = {name: entry["images"] for name, entry in training.items()}
    if (raw / "imagesTs").is_dir():
        names = get_identifiers_from_splitted_dataset_folder(str(raw / "imagesTs"), ending)
        found = create_lists_from_splitted_dataset_folder(str(raw / "imagesTs"), ending, names)
        images |= dict(zip(names, found, strict=True))
    if not images:
        raise UserError(f"{raw} has no image in imagesTr or imagesTs.")
    return [
        LabelledCase(name=name, images=tuple(map(Path, paths)), sources=_sources(raw, name))
        for name, paths in sorted(images.items())
    ]


def _sources(raw: Path, case: str) -> tuple[str, ...]:
    record = raw.joinpath(*RECORDS, f"{case}.json")
    if not record.is_file():
        return ()
    return tuple(filter(None, json.loads(record.read_text()).get("row", {}).get("sources", "").split("; ")))


def names_in(path: str) -> set[str]:
    """Return what may name a subject in a path or a name, in lower case: `sub-` entities, folders, the file's stem."""
    parts = [re.sub(r"\.nii(\.gz)?$", "", part) for part in path.lower().split("/")]
    own = [part for part in parts if part and not _SUBJECT.match(part)]  # BIDS' names are the entity and what is common
    return {*own, *_SUBJECT.findall(path.lower())}


def same_names(scans: pd.DataFrame, cases: Sequence[LabelledCase]) -> list[tuple[str, int]]:
    """Find cases whose subject's or file's name is in the paths of a corpus' scan.

    A name counts that is telling, and that one subject alone has on either side: a folder above all has none.

    Returns:
        (case, row of `scans`), by case.
    """
    rows: dict[str, list[int]] = {}
    for row, paths in enumerate(scans[_present(scans, _PLACES)].itertuples(index=False)):
        for name in set().union(*(names_in(path) for path in paths)):
            if _TELLING.fullmatch(name):
                rows.setdefault(name, []).append(row)
    subjects = scans["subject"].to_numpy()
    own = {name: found for name, found in rows.items() if len({subjects[row] for row in found}) == 1}
    times = Counter(name for _, name in {(case.subject, name) for case in cases for name in case.identifiers})
    return [
        (case.name, row)
        for case in cases
        for row in sorted({row for name in case.identifiers if times[name] == 1 for row in own.get(name, [])})
    ]


def numbered_alike(scans: pd.DataFrame, cases: Iterable[LabelledCase], origin: Origin) -> list[tuple[str, int]]:
    """Find cases that say in their name which subject of an origin they are (`soop0468`), in the corpus' part of it.

    Returns:
        (case, row of `scans`), by case.
    """
    if origin.subject is None:
        return []
    columns, originals = _present(scans, ("dataset", "dataset_doi", *_PLACES)), _present(scans, _PLACES[1:]) or ["path"]
    rows: dict[int, set[int]] = {}
    for row, texts in enumerate(scans[columns].to_dict("records")):
        if not origin.words & words_of(" ".join(texts.values())):
            continue
        for number in (number for name in originals for number in _SUBJECT.findall(texts[name].lower())):
            if number.isdecimal():
                rows.setdefault(int(number), set()).add(row)
    pairs = []
    for case in cases:
        numbers = {int(match[1]) for name in case.identifiers if (match := re.fullmatch(origin.subject, name))}
        pairs += [(case.name, row) for row in sorted(set().union(*(rows.get(number, set()) for number in numbers)))]
    return pairs


def _present(scans: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    return [name for name in columns if name in scans]
