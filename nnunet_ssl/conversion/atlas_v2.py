"""Convert ATLAS v2.0 (T1, chronic stroke) for nnU-Net: Dataset501_ATLASv2."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_ssl.console import command
from nnunet_ssl.conversion.atlas import Session, find_sessions
from nnunet_ssl.conversion.channels import Facts, read_image
from nnunet_ssl.conversion.dataset import Case, Part, Prepared
from nnunet_ssl.conversion.discovery import ImageFile, Skipped, nothing_found
from nnunet_ssl.conversion.script import DatasetInfo, make_parser, parse, run

INFO = DatasetInfo(
    name="ATLASv2",
    channel_names={"t1": "T1"},
    numbers={("t1",): 501},
    reference="Liew et al., Scientific Data 2022, doi 10.1038/s41597-022-01401-7",
    licence="ATLAS data use agreement",
)

EXAMPLE = """\
example:
  python dataset_conversion/Dataset501_ATLASv2.py -i /data/ATLAS_2 --folds cohort
  python dataset_conversion/Dataset501_ATLASv2.py -i /data/new_patients --images_only -o /data/prepared

Decrypt the archive first: openssl aes-256-cbc -md sha256 -d -a -in ATLAS_R2.0_encrypted.tar.gz -out ATLAS_R2.0.tar.gz
Found by looking: ATLAS_2/{Training,Testing}/R001/sub-*/ses-1/anat and data/{train,test}/derivatives/ATLAS/sub-*.
"""

EXPECTED = (
    "Training/R001/sub-r001s001/ses-1/anat/"
    "sub-r001s001_ses-1_space-MNI152NLin2009aSym_{T1w,label-L_desc-T1lesion_mask}.nii.gz"
)
PARTS: dict[str, Part] = {"training": "Tr", "train": "Tr", "testing": "Ts", "test": "Ts"}


def find_cases(root: Path, images_only: bool) -> tuple[list[Case], list[Skipped]]:
    """Find the T1 images below `root` and, but for `images_only`, their lesion masks.

    Raises:
        UserError: it isn't ATLAS, or two folders hold images of one name.
    """
    found = find_sessions(root, images_only)
    made = [_case(session, images_only) for session in found.sessions]
    cases = [case for case in made if isinstance(case, Case)]
    skipped_cases = found.incomplete + [case for case in made if isinstance(case, Skipped)]
    if not any(case.part == "Tr" or images_only for case in cases):
        raise nothing_found(
            root, found.images, skipped_cases, name="ATLAS v2.0", expected=EXPECTED, images_only=images_only
        )
    return cases, found.skipped + skipped_cases


def _case(session: Session, images_only: bool) -> Case | Skipped:
    masks = session.masks
    part = _part(session.image, bool(masks))
    if part == "Tr" and not masks and not images_only:
        return Skipped(session.scan_id, "a training case without lesion mask")
    cohort = re.match(r"sub-(r\d+)s\d+$", session.subject)
    return Case(
        id=session.scan_id,
        subject=session.subject,
        images={"t1": session.image.path},
        masks=tuple(mask.path for mask in masks),
        labelled=bool(masks),
        part=part,
        group=cohort[1].upper() if cohort else session.subject,
        notes=session.notes,
    )


def _part(image: ImageFile, has_mask: bool) -> Part:
    """Tell training from test by the closest folder that says it, else by the mask."""
    named = [PARTS[name.lower()] for name in image.folders if name.lower() in PARTS]
    return named[-1] if named else ("Tr" if has_mask else "Ts")


def prepare(case: Case) -> Prepared:
    """Read the T1."""
    facts: Facts = {}
    return Prepared({"t1": read_image(case.images["t1"], facts)}, facts)


@command
def main() -> None:
    parser = make_parser(INFO, __doc__, EXAMPLE)
    parser.add_argument("--folds", choices=("random", "cohort"), default="random", help="how to divide into five folds")
    arguments = parse(parser)
    cases, skipped = find_cases(arguments.i, arguments.images_only)
    run(arguments, INFO, cases, skipped, prepare, arguments.folds)


if __name__ == "__main__":
    main()
