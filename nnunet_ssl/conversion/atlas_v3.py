"""Convert ATLAS R3.0 (T1, stroke; the data of ISLES'26) for nnU-Net: Dataset504_ATLASv3."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from nnunet_ssl.console import command
from nnunet_ssl.conversion.atlas import Session, find_sessions
from nnunet_ssl.conversion.channels import Facts, note, read_image
from nnunet_ssl.conversion.dataset import Case, Prepared
from nnunet_ssl.conversion.discovery import ImageFile, Skipped, nothing_found
from nnunet_ssl.conversion.script import DatasetInfo, make_parser, parse, run
from nnunet_ssl.conversion.splits import size_bins
from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import Volume, align_mask, corners_of, read_mask

logger = logging.getLogger(__name__)

INFO = DatasetInfo(
    name="ATLASv3",
    channel_names={"t1": "T1"},
    numbers={("t1",): 504},
    reference="ATLAS R3.0, https://isles-26.grand-challenge.org",
    licence="ATLAS data use agreement",
)

EXAMPLE = """\
example:
  python dataset_conversion/Dataset504_ATLASv3.py -i /data/ATLAS3_Training_Raw --folds centre
  python dataset_conversion/Dataset504_ATLASv3.py -i /data/new_patients --images_only -o /data/prepared

Give it the RAW release, which is what ISLES'26 tests on: R001/sub-*/ses-1/anat/sub-*_space-orig_desc-brain_T1w.nii.gz.
"""
EXPECTED = (
    "R001/sub-r001s001/ses-1/anat/"
    "sub-r001s001_ses-1_{space-orig_desc-brain_T1w,space-orig_label-lesion_desc-T1lesion_mask}.nii.gz"
)

CHRONIC_DAYS = 180
"""A stroke is chronic from this day on, as the data have it; the challenge's page says the opposite."""

BACKGROUND_TOLERANCE = 0.01
"""Voxels this close to the background's value, as a share of the brain's range, are background."""


SPECK = 0.01
"""What is smaller than this share of the brain, and lies apart from it, is background as well."""


@dataclass(frozen=True, kw_only=True)
class StrokeCase(Case):
    """A case, and what its table says.

    Attributes:
        days: after the stroke; None where the table does not say. Values of 0 and less occur.
        chronicity: "chronic", "earlier" or "unknown".
        atlas2: the part of ATLAS v2.0 that it comes from, "training" or "testing", if it does.
    """

    days: float | None = None
    chronicity: str = "unknown"
    atlas2: str = ""


def find_cases(root: Path, images_only: bool) -> tuple[list[StrokeCase], list[Skipped]]:
    """Find the T1 images below `root` and, but for `images_only`, their lesion masks and tables.

    Raises:
        UserError: it isn't the raw release of ATLAS R3.0, or two folders hold images of one name.
    """
    found = find_sessions(root, images_only, None if images_only else _not_raw)
    complete = [session for session in found.sessions if session.masks or images_only]
    incomplete = [
        Skipped(session.scan_id, "without lesion mask") for session in found.sessions if session not in complete
    ]
    left_out = found.incomplete + incomplete
    if not complete:
        raise nothing_found(
            root, found.images, left_out, name="the raw ATLAS R3.0", expected=EXPECTED, images_only=images_only
        )
    tables = {session.scan_id: _table_of(session) for session in complete}
    used = {str(path.relative_to(root.absolute())) for path in tables.values() if path}
    skipped = [item for item in found.skipped if item.what not in used]
    return [_case(session, tables[session.scan_id]) for session in complete], skipped + left_out


def _not_raw(image: ImageFile) -> str | None:
    """Refuse what other archives of ATLAS hold: images in MNI space, or preprocessed ones."""
    if image.entity("space") != "space-orig":
        return "not in native space (space-orig), on which ISLES'26 tests"
    return None


def _table_of(session: Session) -> Path | None:
    path = session.image.path.with_name(f"{session.scan_id}_metadata.csv")
    return path if path.is_file() else None


def _case(session: Session, table: Path | None) -> StrokeCase:
    row = _read_row(table)
    days, oddities = _number(row, "DAYS_POST_STROKE")
    flag, more = _number(row, "CHRONICITY")
    chronicity = _chronicity(days, flag)
    notes = [*session.notes, *oddities, *more]
    if session.masks and not row:
        notes.append("its table has no row" if table else "it has no table")
    centre, site = _centre(session.subject, row), row.get("SITE", "").upper()
    if site and site != centre:
        notes.append(f"CHECK: its table is of the centre {site}")
    if chronicity == "earlier" and flag == 1:
        notes.append(f"CHECK: CHRONICITY is 1, but the scan is of day {days:g}; taken for earlier")
    return StrokeCase(
        id=session.scan_id,
        subject=session.subject,
        images={"t1": session.image.path},
        masks=tuple(mask.path for mask in session.masks),
        labelled=bool(session.masks),
        part="Tr" if session.masks else "Ts",
        group=centre,
        notes=tuple(notes),
        days=days,
        chronicity=chronicity,
        atlas2=row.get("ATLAS2_DATASET", "").lower(),
    )


def _read_row(table: Path | None) -> dict[str, str]:
    """Read a table's only row by the names of its columns, whose order differs; none has no row in some cases."""
    if table is None:
        return {}
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        row = next(csv.DictReader(file), None) or {}
    return {str(name).strip().upper(): (value or "").strip() for name, value in row.items() if isinstance(value, str)}


def _number(row: Mapping[str, str], column: str) -> tuple[float | None, list[str]]:
    """Return a cell's number, None for none, and a note on what is no number."""
    text = row.get(column, "")
    try:
        value = float(text) if text else None
    except ValueError:
        return None, [f"{column} is '{text}', no number"]
    return (value, []) if value is None or math.isfinite(value) else (None, [])


def _chronicity(days: float | None, flag: float | None) -> str:
    """Tell by the day where there is one, else by the flag, which is 1 or missing."""
    if days is not None and days > 0:
        return "chronic" if days >= CHRONIC_DAYS else "earlier"
    return "chronic" if flag == 1 else "unknown"


def _centre(subject: str, row: Mapping[str, str]) -> str:
    """Tell the centre by the subject's name, which every case has, else by the table."""
    named = re.match(r"sub-(r\d+(?=s\d)|soop(?=\d))", subject, re.IGNORECASE)
    return named[1].upper() if named else row.get("SITE", "").upper() or subject


def prepare(case: StrokeCase) -> Prepared:
    """Read the T1, give it a background of 0, and see that its masks lie on it.

    Raises:
        UserError: a mask fits the image voxel by voxel, but its header says that it lies elsewhere.
    """
    facts: Facts = {"days_post_stroke": case.days, "chronicity": case.chronicity, "atlas2": case.atlas2}
    images = put_together({"t1": read_image(case.images["t1"], facts)}, facts)
    for path in case.masks:
        check_place(read_mask(path), images["t1"], path.name, facts)
    return Prepared(images, facts)


def put_together(images: Mapping[str, Volume], facts: Facts) -> dict[str, Volume]:
    """Give the T1 a background of 0."""
    return {name: zero_background(image, facts) for name, image in images.items()}


def zero_background(image: Volume, facts: Facts) -> Volume:
    """Set the background of a skull-stripped image to 0, where it has another value.

    nnU-Net crops to what is not zero and may normalise within it: one centre's images, whose background is negative or
    nearly zero, would be neither cropped nor normalised as the others are. The background's value is subtracted from
    the brain as well, so that contrasts stay as they are. Background is what looks like the image's faces and hangs
    together with them, and specks in it.
    """
    array = image.array
    faces = np.concatenate([array.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])
    if (faces == 0).mean() > 0.5:
        return image
    value = float(np.median(faces))
    tolerance = BACKGROUND_TOLERANCE * (float(np.percentile(array, 99)) - value)
    if (np.abs(faces - value) <= tolerance).mean() < 0.9:
        note(facts, "CHECK: the background is neither 0 nor of one value: is the skull still there?")
        return image
    background = _around_the_brain(np.abs(array - value) <= tolerance)
    note(facts, f"the background of about {value:.3g} was set to 0")
    return image.with_array(np.where(background, np.float32(0), array - np.float32(value)))


def _around_the_brain(candidates: np.ndarray) -> np.ndarray:
    """Return the candidates that hang together with the image's faces, and the specks that they enclose."""
    labels, _ = ndimage.label(candidates)
    at_faces = [np.unique(labels.take(end, axis)) for axis in range(3) for end in (0, -1)]
    background = np.isin(labels, np.setdiff1d(np.concatenate(at_faces), 0))
    parts, count = ndimage.label(~background)
    if not count:
        return background
    sizes = np.bincount(parts.ravel())
    speck = sizes < SPECK * sizes[1:].max()
    return background | speck[parts]


def check_place(mask: Volume, image: Volume, name: str, facts: Facts) -> None:
    """See that a mask of the image's shape, whose header gives it another field of view, lies where that says.

    Raises:
        UserError: it does not: voxel by voxel it lies in the brain, by its header elsewhere.
    """
    if mask.array.shape != image.array.shape or not mask.array.any() or not (mask.oriented and image.oriented):
        return
    off_mm = float(np.abs(_field_of_view(mask) - _field_of_view(image)).max())
    if off_mm <= max(image.spacing):
        return
    brain = image.array != 0
    placed, _ = align_mask(mask, image)
    by_voxel, by_header = ((brain & array).sum() / mask.array.sum() for array in (mask.array, placed))
    said = f"{name} has the image's shape, but its header puts its field of view {off_mm:.0f} mm off"
    shares = f"{by_header:.0%} of the lesion lie in the brain so, {by_voxel:.0%} voxel by voxel"
    if by_header < by_voxel - 0.1:
        raise UserError(f"{said}: {shares}. Give it the image's header if it was drawn on that image.")
    note(facts, f"CHECK: {said}, and there it was left: {shares}")


def _field_of_view(volume: Volume) -> np.ndarray:
    """Return the least and the largest x, y and z of the voxels' centres in mm, (2, 3)."""
    places = nib.affines.apply_affine(volume.affine, corners_of(volume.array.shape))
    return np.array([places.min(axis=0), places.max(axis=0)])


def strata_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return by what folds are balanced: the size of the lesion, in five bins, and chronic or not."""
    bins = size_bins({row["case"]: row["label_ml"] for row in rows})
    return {row["case"]: f"{row['chronicity']} {bins[row['case']]}" for row in rows}


@command
def main() -> None:
    parser = make_parser(INFO, __doc__, EXAMPLE)
    parser.add_argument(
        "--folds",
        choices=("random", "centre"),
        default="random",
        help="how to divide into five folds; centre: whole centres are held out (balanced by lesion size and time)",
    )
    arguments = parse(parser)
    cases, skipped = find_cases(arguments.i, arguments.images_only)
    overlap = [case.atlas2 for case in cases if case.atlas2]
    run(arguments, INFO, cases, skipped, prepare, arguments.folds, strata_of)
    if overlap:
        logger.info(
            "%d of %d cases are in ATLAS v2.0 too, %d of them in its training part (column atlas2 of the report): a "
            "network that was trained on ATLAS v2.0 has seen them.",
            len(overlap),
            len(cases),
            overlap.count("training"),
        )


if __name__ == "__main__":
    main()
