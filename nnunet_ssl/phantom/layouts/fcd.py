"""Bonn FCD-II (OpenNeuro ds004199): FLAIR and T1 of patients with focal cortical dysplasia and of healthy controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_ssl.phantom.acquisition import ScanGrid, draw_quality, move, scan_grid
from nnunet_ssl.phantom.anatomy import Person, build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.layouts.nifti import write_litter, write_nifti
from nnunet_ssl.phantom.lesions import focal_dysplasia, lesion_volume
from nnunet_ssl.phantom.raters import CONTRAST_TO_NOISE, Annotated

MODALITIES = ("flair", "t1")

MISMATCHED = "sub-00048"
"""The subject whose ROI is named after another FLAIR acquisition, as in the original."""


@dataclass(frozen=True)
class Subject:
    """A row of participants.tsv and how the subject was scanned."""

    name: str
    person: Person
    group: str
    split: str
    t1: str
    flair: str
    thick: bool

    @property
    def row(self) -> dict[str, object]:
        patient = self.group == "fcd"
        return {
            "participant_id": self.name,
            "group": self.group,
            "sex": self.person.sex,
            "age_epilepsyonset": max(self.person.age - 12, 1) if patient else "n/a",
            "age_scan": self.person.age,
            "hemisphere": "R" if patient else "n/a",
            "lobe": "FL" if patient else "n/a",
            "split": self.split,
        }


def write_fcd(
    folder: Path | str,
    *,
    n_patients: int,
    n_controls: int,
    voxel_mm: float = 3.0,
    seed: int = 0,
    quirks: bool = True,
    dangling: int = 0,
    rater: str | None = None,
    contrast_to_noise: float = CONTRAST_TO_NOISE,
    truth: Path | None = None,
) -> Path:
    """Write a synthetic Bonn FCD-II.

    Args:
        folder: becomes the data set's top folder (``ds004199``).
        n_patients: subjects with a dysplasia; every third is in the test split.
        n_controls: healthy subjects without ROI.
        voxel_mm: 1 is the real size (T1 0.8 mm, FLAIR 1 mm), 3 is fast.
        seed: fixes everything.
        quirks: participants.tsv with a byte-order mark and shuffled rows, several protocols, the subject with the
            mismatched ROI name (the second patient), a T1 that lies elsewhere than the FLAIR, dot-files.
        dangling: of so many subjects, counted from the last, the images are git-annex links without content.
        rater, contrast_to_noise, truth: as for :func:`nnunet_ssl.phantom.layouts.isles.write_isles`.

    Returns:
        the folder.
    """
    folder = Path(folder)
    subjects = _draw_subjects(n_patients, n_controls, seed, quirks)
    for number, subject in enumerate(subjects):
        anat = folder / subject.name / "anat"
        if number >= len(subjects) - dangling:
            for stem in (subject.t1, subject.flair):
                _write_dangling_link(anat / f"{subject.name}_{stem}.nii.gz")
            continue
        rng = np.random.default_rng([seed, number, 1])
        case = _draw_case(subject, rng, voxel_mm, rater, contrast_to_noise)
        true_mask = Path(truth) / f"{subject.name}.nii.gz" if truth and subject.group == "fcd" else None
        _write_subject(anat, subject, case, rng, voxel_mm, quirks, true_mask)
        if quirks and number % 4 == 0:
            write_litter(anat)
    table = pd.DataFrame([subject.row for subject in subjects])
    if quirks:
        table = table.sample(frac=1, random_state=seed)
    table.to_csv(folder / "participants.tsv", sep="\t", index=False, encoding="utf-8-sig" if quirks else "utf-8")
    return folder


def _draw_subjects(n_patients: int, n_controls: int, seed: int, quirks: bool) -> list[Subject]:
    subjects = []
    for number in range(n_patients + n_controls):
        patient = number < n_patients
        person = draw_person(np.random.default_rng([seed, number]), ages=(8, 60))
        name = MISMATCHED if quirks and number == 1 and patient else f"sub-{3 * number + 1:05d}"
        newer = quirks and patient and number % 2 == 0  # protocol and group are confounded, as in the original
        singleton = quirks and number == n_patients
        subjects.append(
            Subject(
                name=name,
                person=person,
                group="fcd" if patient else "hc",
                split="test" if patient and number % 3 == 2 else "train",
                t1="acq-sag111_T1w" if newer else "acq-iso08_T1w",
                flair="acq-tse3dvfl_FLAIR" if newer else "acq-corhipp4mm_FLAIR" if singleton else "acq-T2sel_FLAIR",
                thick=singleton,
            )
        )
    return subjects


def _draw_case(
    subject: Subject, rng: np.random.Generator, voxel_mm: float, rater: str | None, contrast_to_noise: float
) -> Annotated:
    healthy = build_anatomy(subject.person, mni_grid(voxel_mm))
    anatomy, mask = healthy, np.zeros(healthy.grid.shape, bool)
    if subject.group == "fcd":
        volume_ml = lesion_volume(rng, median_ml=4, spread=0.8, smallest_ml=0.8, largest_ml=25)
        anatomy, mask = focal_dysplasia(healthy, rng, volume_ml)
    return Annotated(healthy, anatomy, mask, rater, contrast_to_noise)


def _write_subject(
    anat: Path,
    subject: Subject,
    case: Annotated,
    rng: np.random.Generator,
    voxel_mm: float,
    quirks: bool,
    true_mask: Path | None,
) -> None:
    slices = max(4.0, voxel_mm) if subject.thick else voxel_mm
    flair_grid = scan_grid(case.anatomy, (voxel_mm, slices, voxel_mm), orientation="LAS")
    quality = replace(draw_quality(rng), thickness_mm=slices, slice_axis=1)
    flair = 400 * case.acquire("flair", quality, rng, flair_grid)
    write_nifti(anat / f"{subject.name}_{subject.flair}.nii.gz", flair, flair_grid.affine, np.int16)
    t1_grid = scan_grid(case.anatomy, (0.8 * voxel_mm,) * 3, orientation="PSR", shift_mm=tuple(rng.uniform(-6, 6, 3)))
    motion = move(np.eye(4), tuple(rng.uniform(-4, 4, 3)), tuple(rng.uniform(-4, 4, 3))) if quirks else np.eye(4)
    where = ScanGrid(t1_grid.shape, np.linalg.inv(motion) @ t1_grid.affine)
    t1 = 300 * case.acquire("t1", draw_quality(rng), rng, where)
    write_nifti(anat / f"{subject.name}_{subject.t1}.nii.gz", t1, t1_grid.affine, np.int16)
    if subject.group == "fcd":
        stem = "acq-32ch10_FLAIR" if subject.name == MISMATCHED else subject.flair
        write_nifti(anat / f"{subject.name}_{stem}_roi.nii.gz", case.drawn_on(flair_grid), flair_grid.affine, np.uint8)
    if true_mask:
        write_nifti(true_mask, case.true_on(flair_grid), flair_grid.affine, np.uint8)


def _write_dangling_link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    key = f"MD5E-s1234567--{path.stem.encode().hex()[:32]}.nii.gz"
    path.symlink_to(Path("../../.git/annex/objects/Xx/Yy") / key / key)
