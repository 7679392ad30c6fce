"""Convert labelled scans of your own, in a BIDS tree or in folders like one, for nnU-Net."""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nnunet_ssl.console import command
from nnunet_ssl.conversion.channels import Facts, read_image, registered_onto, usable_channels, with_places
from nnunet_ssl.conversion.dataset import Case, Prepared
from nnunet_ssl.conversion.discovery import (
    ImageFile,
    Skipped,
    choose_images,
    find_images,
    lesion_masks,
    nothing_found,
)
from nnunet_ssl.conversion.script import DatasetInfo, make_parser, parse, run
from nnunet_ssl.corpus.modalities import MODALITIES, SYNONYMS, UNKNOWN, is_derived
from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import Volume, alike_but_unplaced, read_volume, same_grid

INFO = DatasetInfo(
    name="Lesions",
    channel_names={name: name.upper() for name in MODALITIES if name != UNKNOWN},
    numbers={},
    reference="",
    licence="",
    preparation="BIDS",
)

EXAMPLE = """\
examples:
  python dataset_conversion/DatasetXXX_BIDS.py -i /data/bids -d 620 --name OurLesions --channels flair t1 --dry_run
  python dataset_conversion/DatasetXXX_BIDS.py -i /data/bids -d 620 --name OurLesions --channels flair t1
  python dataset_conversion/DatasetXXX_BIDS.py -i /data/bids -d 621 --name OurWMH --channels flair --masks "*label-WMH*"
  python dataset_conversion/DatasetXXX_BIDS.py -i /data/new -d 620 --channels flair t1 --images_only -o /data/prepared

The first channel is the one that the masks were drawn on: it gives the grid. The others stay as they are where they lie
on it, and are registered to it, rigidly, where they do not. Masks may lie anywhere below DIR; images in derivatives do
not count.
"""

MOST_LABELS = 32
"""More values than this are no labels, but an image or probabilities, and what of them is above 0 is no lesion."""

MASK = "mask"
WORDS = {**SYNONYMS, **dict.fromkeys(("mask", "msk", "lesion", "lesions", "roi", "seg", "label", "wmh"), MASK)}
EXPECTED = "sub-01/anat/sub-01_FLAIR.nii.gz and derivatives/lesions/sub-01/anat/sub-01_label-lesion_mask.nii.gz"


def find_cases(
    root: Path, channels: tuple[str, ...], masks: str, images_only: bool, allow_missing: bool = False
) -> tuple[list[Case], list[Skipped]]:
    """Find the sessions below `root` that have the wanted channels and a mask.

    Args:
        root: the folder.
        channels: the first gives the grid.
        masks: what the names of lesion masks look like, with shell wildcards, or with a slash their paths below `root`.
        images_only: the sessions have no masks.
        allow_missing: the first channel is enough; of new images, any.

    Raises:
        UserError: there is no case, or two folders hold images of one name.
    """
    images, skipped = find_images(root)
    sessions: dict[str, dict[str, list[ImageFile]]] = defaultdict(lambda: defaultdict(list))
    drawn: dict[str, list[ImageFile]] = defaultdict(list)
    for image in images:
        if fnmatch.fnmatch((image.relative if "/" in masks else image.path.name).lower(), masks.lower()):
            drawn[image.scan_id(WORDS)].append(image)
        elif "derivatives" in image.folders[1:] or is_derived(image.stem):
            skipped.append(Skipped(image.relative, f"a derived image that --masks {masks} does not name"))
        elif kind := _contrast(image):
            sessions[image.scan_id(WORDS)][kind].append(image)
        else:
            skipped.append(Skipped(image.relative, "no contrast that is known by its name"))
    grids = channels if images_only else channels[:1]
    found = []
    for scan_id, files in sorted(sessions.items()):
        needed = usable_channels(list(files), channels, grids, allow_missing=allow_missing)
        masks_there = lesion_masks(drawn.pop(_whose(scan_id, sessions, drawn), []))
        found.append(_case(scan_id, files, needed, [] if images_only else masks_there, images_only, skipped))
    alone = [image for files in drawn.values() for image in files]
    skipped += [Skipped(image.relative, "a mask, and no scan of its session") for image in alone]
    cases = [case for case in found if isinstance(case, Case)]
    left_out = [case for case in found if isinstance(case, Skipped)]
    if not cases:
        name = f"{', '.join(channels)} with lesion masks named {masks}"
        raise nothing_found(root, images, left_out, name=name, expected=EXPECTED, images_only=images_only)
    return cases, skipped + left_out


def _contrast(image: ImageFile) -> str | None:
    kind = image.kind(SYNONYMS)
    return "t1c" if kind == "t1" and image.entity("ce") else kind


def _whose(scan_id: str, sessions: Mapping[str, object], drawn: Mapping[str, object]) -> str:
    """The name of a session's masks: its own, or that of its subject, if this is the only session."""
    subject = scan_id.partition("_ses-")[0]
    alone = sum(name.partition("_ses-")[0] == subject for name in sessions) == 1
    return subject if alone and scan_id not in drawn else scan_id


def _case(
    scan_id: str,
    files: Mapping[str, list[ImageFile]],
    needed: tuple[str, ...] | str,
    masks: Sequence[ImageFile],
    images_only: bool,
    skipped: list[Skipped],
) -> Case | Skipped:
    """Put one session together from the images that are `needed`, or say why it cannot be."""
    if isinstance(needed, str):
        return Skipped(scan_id, needed)
    if not masks and not images_only:
        return Skipped(scan_id, "no lesion mask; images without one are prepared with --images_only")
    images = choose_images(scan_id, files, needed, WORDS, skipped)
    united = [f"CHECK: the union of {len(masks)} masks: {', '.join(mask.path.name for mask in masks)}"]
    return Case(
        id=scan_id,
        subject=images[needed[0]].entity("sub") or scan_id,
        images={kind: image.path for kind, image in images.items()},
        masks=tuple(mask.path for mask in masks),
        labelled=not images_only,
        notes=tuple(united if len(masks) > 1 else ()),
    )


def prepare(case: Case) -> Prepared:
    """Read the channels of a case and put them together.

    Raises:
        UserError: a mask is none, or was drawn on another channel than the first.
    """
    facts: Facts = {}
    images = {name: read_image(path, facts) for name, path in case.images.items()}
    for path in case.masks:
        _check_mask(path, images)
    return Prepared(put_together(images, facts), facts)


def _check_mask(path: Path, images: Mapping[str, Volume]) -> None:
    """See that a mask is one, and does not lie on a channel that is going to be moved without it.

    Raises:
        UserError: it is not, or it does.
    """
    mask, (first, *others) = read_volume(path), images
    if (count := len(np.unique(mask.array))) > MOST_LABELS:
        raise UserError(
            f"{path.name} holds {count:,} different values, so it is no mask: say by --masks which ones are."
        )
    if same_grid(mask, images[first]) or alike_but_unplaced(mask, images[first]):
        return
    if on := [name for name in others if same_grid(mask, images[name])]:
        raise UserError(f"{path.name} lies on the grid of {on[0]}, not of {first}: name {on[0]} first in --channels.")


def put_together(images: Mapping[str, Volume], facts: Facts) -> dict[str, Volume]:
    """Bring all channels onto the grid of the first: by registration, unless they lie on it."""
    together = with_places(images, facts)
    first, *others = together
    for name in others:
        if same_grid(together[name], together[first]):
            together[name] = together[first].with_array(together[name].array)
        else:
            together[name] = registered_onto(together[name], together[first], name, facts)
    return together


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(INFO, __doc__ or "", EXAMPLE)
    parser.add_argument("--name", help="what follows the number in the data set's name")
    parser.add_argument(
        "--masks",
        default="*lesion*",
        metavar="PATTERN",
        help="names of the lesion masks, or paths below DIR; * stands for anything (default: *lesion*)",
    )
    parser.set_defaults(channels=None)
    return parser


@command
def main() -> None:
    arguments = parse(_parser())
    if not arguments.channels:
        raise UserError("Name the channels, first that on which the masks were drawn, such as: --channels flair t1")
    if not arguments.images_only and not re.fullmatch(r"\w+", arguments.name or "", re.ASCII):
        raise UserError("Give the data set a name of letters and digits, such as: --name OurLesions")
    channels = tuple(dict.fromkeys(arguments.channels))
    names = {name: INFO.channel_names[name] for name in channels}
    info = replace(INFO, name=arguments.name or INFO.name, channel_names=names)
    cases, skipped = find_cases(arguments.i, channels, arguments.masks, arguments.images_only, arguments.allow_missing)
    run(arguments, info, cases, skipped, prepare)


if __name__ == "__main__":
    main()
