"""FOMO60K and its successors: many sources, sessions of co-registered scans, TSV tables, in the two known layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from nnunet_ssl.phantom.acquisition import acquire, draw_quality
from nnunet_ssl.phantom.anatomy import MNI_BOX, Anatomy, Grid, Person, box_grid, build_anatomy, draw_person
from nnunet_ssl.phantom.layouts.nifti import write_litter, write_nifti
from nnunet_ssl.phantom.lesions import acute_stroke, chronic_stroke, lesion_volume, white_matter_hyperintensities


@dataclass(frozen=True)
class Source:
    """One of the data sets a corpus was gathered from: its name, whether it is stripped, who is scanned, and how."""

    name: str
    stripped: bool
    group: str
    protocols: tuple[tuple[str, ...], ...]


SOURCES = (
    Source("OASIS1", True, "control", (("t1", "t2"), ("t1", "flair", "t2"))),
    Source("IXI", True, "control", (("t1", "t2", "pd"), ("t1", "t2", "pd", "dwi"))),
    Source("SOOP", False, "stroke", (("t1", "flair", "dwi", "adc"), ("flair", "dwi", "adc"))),
    Source("NIMH", True, "control", (("t1", "flair", "t2s", "swi"), ("t1", "t1c", "t2", "flair"))),
)


def write_fomo(
    folder: Path | str,
    *,
    n_subjects: int,
    layout: Literal["A", "B"] = "B",
    voxel_mm: float = 3.0,
    seed: int = 0,
    quirks: bool = True,
    sessions: int | None = None,
    modalities: Sequence[str] | None = None,
) -> Path:
    """Write a synthetic corpus for pre-training.

    Args:
        folder: becomes the corpus' top folder (``fomo-60k`` or ``FOMO60K``).
        n_subjects: how many subjects; they take turns among the sources.
        layout: "A" = ``sub_1/ses_1/t1.nii.gz`` without tables, "B" = ``PT001_OASIS1/sub_1/...`` with tables.
        voxel_mm: about the voxel size; each session has its own (never exactly 1 mm).
        seed: fixes everything.
        quirks: repeated scans (``t1_2``), scans of unknown modality (``scan_1``), a session with a single scan, a scan
            with NaN, dot-files and ``n/a`` in the tables. Quirks never take away a subject's pairs, but for the
            single-scan subject (every seventh).
        sessions: sessions per subject; None = one, and two for every third subject.
        modalities: the scans of every session. The corpus has one source then, skull-stripped, and every second subject
            had a stroke: else a source's group, stripping and protocol go together, as they do in real corpora, and a
            network may read off one what it should read off the brain.

    Returns:
        the folder.
    """
    folder = Path(folder)
    rows = []
    for number in range(n_subjects):
        sources = SOURCES if modalities is None else [_uniform(modalities, number)]
        source_number, subject = number % len(sources), number // len(sources) + 1
        source = sources[source_number]
        dataset = f"PT{source_number + 1:03d}_{source.name}"
        name = f"sub_{number + 1}" if layout == "A" else f"{dataset}/sub_{subject}"
        rng = np.random.default_rng([seed, number])
        person = draw_person(rng)
        for visit in range(sessions or (2 if number % 3 == 1 else 1)):
            session = folder / name / f"ses_{visit + 1}"
            lone = quirks and number % 7 == 5
            for file in _write_session(session, person.older(2 * visit), source, rng, voxel_mm, quirks, lone, number):
                rows.append(_table_row(dataset, name, session.name, file, person.older(2 * visit), source))
        if quirks and number % 5 == 0:
            write_litter(session)
    if layout == "B":
        _write_tables(folder, pd.DataFrame(rows), quirks)
    return folder


def _uniform(modalities: Sequence[str], number: int) -> Source:
    """The only source of a corpus in which every session has the same modalities, as far as a subject is concerned."""
    return Source("PHANTOM", True, "stroke" if number % 2 else "control", (tuple(modalities),))


def _write_session(
    folder: Path,
    person: Person,
    source: Source,
    rng: np.random.Generator,
    voxel_mm: float,
    quirks: bool,
    lone: bool,
    number: int,
) -> Iterator[str]:
    """Write one session, all scans on one grid, and yield the file names."""
    anatomy = _patient(person, source, rng, _session_grid(rng, voxel_mm))
    protocol = source.protocols[int(rng.integers(len(source.protocols)))]
    names = {modality: modality for modality in (protocol[:1] if lone else protocol)}
    if quirks and not lone:
        extras = (
            {f"{protocol[0]}_2": protocol[0]},
            {"scan_1": protocol[-1]},
            {"dwi_2": "b0"} if "dwi" in names else {},
        )
        names |= extras[number % 3]
    thick = rng.random() < 0.4
    for stem, modality in names.items():
        quality = draw_quality(rng, thick=thick and modality not in ("t1", "t1c"), stripped=source.stripped)
        image = acquire(anatomy, modality, quality, rng) * (1000 if modality == "adc" else rng.uniform(150, 900))
        integers = rng.random() < 0.5
        if quirks and stem.startswith("scan_") and number % 2:
            image[image.shape[0] // 2, :2, :2] = np.nan
            integers = False
        write_nifti(folder / f"{stem}.nii.gz", image, anatomy.grid.affine, np.int16 if integers else np.float32)
        yield f"{stem}.nii.gz"


def _patient(person: Person, source: Source, rng: np.random.Generator, grid: Grid) -> Anatomy:
    anatomy = build_anatomy(person, grid)
    lesion_rng = np.random.default_rng([*person.seed, 1])  # the same lesion at every visit
    anatomy = white_matter_hyperintensities(anatomy, lesion_rng, person.atrophy)
    if source.group == "stroke":
        volume_ml = lesion_volume(lesion_rng, median_ml=12, spread=1.1, smallest_ml=0.5, largest_ml=150)
        stroke = acute_stroke if lesion_rng.random() < 0.6 else chronic_stroke
        anatomy, _ = stroke(anatomy, lesion_rng, volume_ml)
    return anatomy


def _session_grid(rng: np.random.Generator, voxel_mm: float) -> Grid:
    """Draw the session's grid: the head with some margin, voxels near `voxel_mm`, sometimes longer along one axis."""
    spacing = np.full(3, voxel_mm * rng.uniform(0.92, 1.08))
    if rng.random() < 0.5:
        spacing[rng.integers(3)] *= rng.uniform(1.05, 1.25)
    box = [(low + rng.uniform(0, 8), high - rng.uniform(0, 8)) for low, high in MNI_BOX]
    return box_grid(box, tuple(np.round(spacing, 3)))


def _table_row(dataset: str, name: str, session: str, file: str, person: Person, source: Source) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "participant_id": name.split("/")[-1],
        "session_id": session,
        "filename": file,
        "sex": person.sex,
        "age": person.age,
        "group": source.group,
    }


def _write_tables(folder: Path, table: pd.DataFrame, quirks: bool) -> None:
    """Write participants.tsv, mapping.tsv and mri_info.tsv."""
    key = ["dataset", "participant_id", "session_id"]
    people = table[[*key, "sex", "age", "group"]].drop_duplicates(key)
    people = people.assign(handedness="R", age=people["age"].astype(object))
    if quirks:
        people.loc[people.index[3::4], ["age", "handedness"]] = "n/a"
    columns = [*key, "sex", "age", "handedness", "group"]
    people[columns].to_csv(folder / "participants.tsv", sep="\t", index=False)
    files = table[[*key, "filename"]]
    original = files["participant_id"] + "_" + files["filename"]
    files.assign(original_path="rawdata/" + original).to_csv(folder / "mapping.tsv", sep="\t", index=False)
    modality = files["filename"].str.replace(r"(_\d+)?\.nii\.gz$", "", regex=True)
    info = files.assign(Modality=modality, MagneticFieldStrength=3.0, Manufacturer="Synthetic")
    info.to_csv(folder / "mri_info.tsv", sep="\t", index=False)
