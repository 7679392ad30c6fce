"""Convert the Bonn FCD-II data (OpenNeuro ds004199; FLAIR and T1; epilepsy) for nnU-Net: Dataset503_FCDBonn."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from nnunet_ssl.console import command
from nnunet_ssl.conversion.channels import Facts, read_image, registered_onto, usable_channels, with_places
from nnunet_ssl.conversion.dataset import Case, Part, Prepared
from nnunet_ssl.conversion.discovery import (
    ImageFile,
    Skipped,
    choose_images,
    describe_contents,
    find_images,
    lesion_masks,
    nothing_found,
)
from nnunet_ssl.conversion.script import DatasetInfo, chosen_channels, make_parser, parse, run
from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import Volume
from nnunet_ssl.participants import describe_partners, find_partners

INFO = DatasetInfo(
    name="FCDBonn",
    channel_names={"flair": "FLAIR", "t1": "T1"},
    numbers={("flair", "t1"): 503, ("flair",): 516, ("t1",): 517},
    reference="Schuch et al., Scientific Data 2023, doi 10.1038/s41597-023-02386-7",
    licence="CC0",
)

EXAMPLE = """\
examples:
  python dataset_conversion/Dataset503_FCDBonn.py -i /data/ds004199
  python dataset_conversion/Dataset503_FCDBonn.py -i /data/ds004199 --channels flair --no_controls   (Dataset516)
  python dataset_conversion/Dataset503_FCDBonn.py -i /data/new_patients --images_only -o /data/prepared

T1 is registered to FLAIR, where the lesions were drawn. The official split of participants.tsv is kept.
"""

KINDS = {"t1w": "t1", "t1": "t1", "flair": "flair", "roi": "mask", "mask": "mask", "lesion": "mask"}
EXPECTED = "sub-00001/anat/sub-00001_acq-iso08_T1w.nii.gz, ..._FLAIR.nii.gz and ..._FLAIR_roi.nii.gz"
PARTS: dict[str, Part] = {"train": "Tr", "test": "Ts"}

logger = logging.getLogger(__name__)


def find_cases(
    root: Path, channels: tuple[str, ...], images_only: bool, controls: bool, allow_missing: bool = False
) -> tuple[list[Case], list[Skipped]]:
    """Find the subjects below `root` that have the wanted channels and FLAIR, which gives the grid.

    With `allow_missing` some of the channels are enough. Without FLAIR the grid is T1's, but not for patients, whose
    masks are drawn on FLAIR.

    Raises:
        UserError: it isn't the Bonn data set, or two folders hold images of one name.
    """
    images, skipped = find_images(root)
    scans: dict[str, dict[str, list[ImageFile]]] = defaultdict(lambda: defaultdict(list))
    for image in images:
        kind = image.kind(KINDS)
        if kind:
            scans[image.scan_id(KINDS)][kind].append(image)
        else:
            skipped.append(Skipped(image.relative, "neither FLAIR, T1 nor an ROI by its name"))
    subjects = {_person(files, scan_id) for scan_id, files in scans.items()}
    people = {} if images_only else _read_participants(root, images, subjects)
    found = []
    without = people.keys() - subjects
    for scan_id in sorted({*scans, *without}):
        files, person = scans[scan_id], people.get(_person(scans[scan_id], scan_id))
        grids = ("flair",) if person and person["group"] == "fcd" else ("flair", "t1")
        there = [kind for kind, of_kind in files.items() if of_kind]
        needed = usable_channels(there, channels, grids, allow_missing=allow_missing)
        if images_only:
            found.append(_case(scan_id, files, needed, skipped))
        elif person is None:
            found.append(Skipped(scan_id, "not in participants.tsv"))
        elif not controls and person["group"] != "fcd":
            found.append(Skipped(scan_id, "healthy control (--no_controls)"))
        else:
            found.append(_case(scan_id, files, needed, skipped, person))
    cases = [case for case in found if isinstance(case, Case)]
    skipped_cases = [case for case in found if isinstance(case, Skipped)]
    if not any(images_only or case.part == "Tr" for case in cases):
        name = "the Bonn FCD-II data"
        raise nothing_found(root, images, skipped_cases, name=name, expected=EXPECTED, images_only=images_only)
    return cases, skipped + skipped_cases


def _read_participants(root: Path, images: list[ImageFile], subjects: set[str]) -> dict[str, dict[str, str]]:
    """Read the table that tells patients from controls and training from test: subject -> row.

    Rows find their subjects by :func:`find_partners`; the log tells what found no partner.

    Raises:
        UserError: there is no such table, or two rows of one subject differ in group or split.
    """
    tables = sorted(root.rglob("participants.tsv"), key=lambda path: len(path.parts))
    if not tables:
        raise UserError(
            f"{root} has no participants.tsv, which tells patients from controls and training from test in the Bonn "
            f"FCD-II data (OpenNeuro ds004199); found: {describe_contents(images, root)}."
        )
    table = pd.read_csv(tables[0], sep="\t", encoding="utf-8-sig", dtype=str, keep_default_na=False)
    table.columns = table.columns.str.strip()
    missing = {"participant_id", "group", "split"} - set(table.columns)
    if missing:
        raise UserError(f"{tables[0]} lacks the columns {', '.join(sorted(missing))}: is this the Bonn FCD-II data?")
    table = table.apply(lambda column: column.str.strip())
    table[["group", "split"]] = table[["group", "split"]].apply(lambda column: column.str.lower())
    twins = table.drop_duplicates(["participant_id", "group", "split"])["participant_id"].duplicated()
    if twins.any():
        raise UserError(f"{tables[0]} contradicts itself: two rows of one subject differ in group or split. Mend it.")
    rows = [(name,) for name in table["participant_id"]]
    partners = find_partners(rows, [(subject,) for subject in sorted(subjects)])
    found = {subject for (subject,) in partners.values()}
    matching = describe_partners(rows, partners, subjects - found)
    if matching:
        logger.warning("%s: %s.", tables[0], matching)
    return {partners.get(row, row)[0]: person for row, person in zip(rows, table.to_dict("records"))}


def _person(files: dict[str, list[ImageFile]], scan_id: str) -> str:
    """Return the subject of a scan's files."""
    subjects = [image.entity("sub") for images in files.values() for image in images]
    return subjects[0] or scan_id if subjects else scan_id


def _case(
    scan_id: str,
    files: dict[str, list[ImageFile]],
    needed: tuple[str, ...] | str,
    skipped: list[Skipped],
    person: dict[str, str] | None = None,
) -> Case | Skipped:
    """Put one subject together from the images that are `needed`, or say why it cannot be.

    `person` is its row of participants.tsv, None for new images.
    """
    rois = lesion_masks(files["mask"]) if person else []
    if isinstance(needed, str):
        return Skipped(scan_id, needed.replace("no ", "no readable ", 1))
    if person and person["group"] == "fcd" and not rois:
        return Skipped(scan_id, "a patient (group fcd) without readable ROI")
    like = {"flair": rois[0]} if rois else None
    images = choose_images(scan_id, files, needed, KINDS, skipped, like=like)
    notes = []
    if rois and "flair" in images and not rois[0].stem.startswith(images["flair"].stem):
        notes.append(f"ROI named after another scan: {rois[0].path.name}")
    if person and person["group"] != "fcd" and rois:
        notes.append("a control with an ROI, which is used")
    if person and person["split"] not in PARTS:
        notes.append(f"split '{person['split']}' in participants.tsv: used for training")
    return Case(
        id=scan_id,
        subject=images[needed[0]].entity("sub") or scan_id,
        images={kind: image.path for kind, image in images.items()},
        masks=tuple(roi.path for roi in rois),
        labelled=person is not None,
        part=PARTS.get(person["split"], "Tr") if person else "Tr",
        group=person["group"] if person else "",
        notes=tuple(notes),
    )


def prepare(case: Case) -> Prepared:
    """Read the channels of a case and put them together."""
    facts: Facts = {}
    images = {name: read_image(path, facts) for name, path in case.images.items()}
    return Prepared(put_together(images, facts), facts)


def put_together(images: Mapping[str, Volume], facts: Facts) -> dict[str, Volume]:
    """Bring T1 onto FLAIR's grid by registration."""
    together = with_places(images, facts)
    if "t1" in together and "flair" in together:
        together["t1"] = registered_onto(together["t1"], together["flair"], "t1", facts)
    return together


@command
def main() -> None:
    parser = make_parser(INFO, __doc__, EXAMPLE)
    parser.add_argument("--no_controls", action="store_true", help="leave out the healthy controls")
    arguments = parse(parser)
    channels = chosen_channels(arguments, INFO)
    cases, skipped = find_cases(
        arguments.i, channels, arguments.images_only, not arguments.no_controls, arguments.allow_missing
    )
    run(arguments, INFO, cases, skipped, prepare, folds="stratified")


if __name__ == "__main__":
    main()
