"""Convert ISLES 2022 (DWI, ADC and FLAIR; acute stroke) for nnU-Net: Dataset502_ISLES2022."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnunet_ssl.console import command
from nnunet_ssl.conversion.channels import (
    Facts,
    note,
    onto_grid,
    read_image,
    registered_onto,
    usable_channels,
    with_places,
    without_negative,
)
from nnunet_ssl.conversion.dataset import Case, Prepared
from nnunet_ssl.conversion.discovery import (
    ImageFile,
    Skipped,
    choose_images,
    find_images,
    lesion_masks,
    nothing_found,
)
from nnunet_ssl.conversion.script import DatasetInfo, chosen_channels, make_parser, parse, run
from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import Volume
from nnunet_ssl.imaging.registration import foreground

INFO = DatasetInfo(
    name="ISLES2022",
    channel_names={"dwi": "DWI", "adc": "ADC", "flair": "FLAIR"},
    numbers={
        ("dwi", "adc", "flair"): 502,
        ("dwi",): 510,
        ("adc",): 511,
        ("flair",): 512,
        ("dwi", "adc"): 513,
        ("dwi", "flair"): 514,
        ("adc", "flair"): 515,
    },
    reference="Hernandez Petzsche et al., Scientific Data 2022, doi 10.1038/s41597-022-01875-5",
    licence="CC BY 4.0",
)

EXAMPLE = """\
examples:
  python dataset_conversion/Dataset502_ISLES2022.py -i /data/ISLES-2022
  python dataset_conversion/Dataset502_ISLES2022.py -i /data/ISLES-2022 --channels dwi     (one modality: Dataset510)
  python dataset_conversion/Dataset502_ISLES2022.py -i /data/ISLES-2022 --allow_missing   (with sessions that lack some)
  python dataset_conversion/Dataset502_ISLES2022.py -i /data/new_patients --images_only -o /data/prepared

FLAIR is registered to DWI, ADC is brought to 1e-6 mm2/s. Found by looking: the published BIDS layout, the older one
with rawdata/, and images/ beside labels_derivatives/.
"""

KINDS = {"dwi": "dwi", "adc": "adc", "flair": "flair", "msk": "mask", "mask": "mask", "lesion": "mask", "seg": "mask"}

EXPECTED = (
    "sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_{dwi,adc}.nii.gz, .../anat/..._FLAIR.nii.gz and "
    "derivatives/.../..._msk.nii.gz"
)


def find_cases(
    root: Path, channels: tuple[str, ...], images_only: bool, allow_missing: bool = False
) -> tuple[list[Case], list[Skipped]]:
    """Find the sessions below `root` that have the wanted channels, DWI (it gives the grid) and a mask.

    With `allow_missing` some of the channels are enough. The grid is then DWI's or ADC's, on which masks are drawn; for
    new images FLAIR's, too.

    Raises:
        UserError: it isn't ISLES 2022, or two folders hold images of one name.
    """
    images, skipped = find_images(root)
    sessions: dict[str, dict[str, list[ImageFile]]] = defaultdict(lambda: defaultdict(list))
    for image in images:
        kind = image.kind(KINDS)
        if kind:
            sessions[image.scan_id(KINDS)][kind].append(image)
        else:
            skipped.append(Skipped(image.relative, "neither DWI, ADC, FLAIR nor a mask by its name"))
    grids = ("dwi", "adc", "flair") if images_only else ("dwi", "adc")
    found = []
    for scan_id, files in sorted(sessions.items()):
        there = [kind for kind, of_kind in files.items() if of_kind]
        needed = usable_channels(there, channels, grids, allow_missing=allow_missing)
        found.append(_case(scan_id, files, needed, images_only, skipped))
    cases = [case for case in found if isinstance(case, Case)]
    skipped_cases = [case for case in found if isinstance(case, Skipped)]
    if not cases:
        raise nothing_found(root, images, skipped_cases, name="ISLES 2022", expected=EXPECTED, images_only=images_only)
    return cases, skipped + skipped_cases


def _case(
    scan_id: str,
    files: dict[str, list[ImageFile]],
    needed: tuple[str, ...] | str,
    images_only: bool,
    skipped: list[Skipped],
) -> Case | Skipped:
    """Put one session together from the images that are `needed`, or say why it cannot be."""
    masks = [] if images_only else lesion_masks(files["mask"])
    if isinstance(needed, str):
        return Skipped(scan_id, needed)
    if not masks and not images_only:
        return Skipped(scan_id, "no lesion mask; images without one are prepared with --images_only")
    images = choose_images(scan_id, files, needed, KINDS, skipped)
    return Case(
        id=scan_id,
        subject=images[needed[0]].entity("sub") or scan_id,
        images={kind: image.path for kind, image in images.items()},
        masks=tuple(mask.path for mask in masks),
        labelled=not images_only,
    )


def prepare(case: Case) -> Prepared:
    """Read the channels of a case and put them together.

    Raises:
        UserError: the ADC map is empty.
    """
    facts: Facts = {}
    images = {name: read_image(path, facts) for name, path in case.images.items()}
    return Prepared(put_together(images, facts), facts)


def put_together(images: Mapping[str, Volume], facts: Facts) -> dict[str, Volume]:
    """Bring the channels onto the grid of the first, DWI's: ADC by its header and to one unit, FLAIR by registration.

    Where DWI is missing, the first is ADC or FLAIR.

    Raises:
        UserError: the ADC map is empty.
    """
    together = with_places({name: without_negative(image, facts) for name, image in images.items()}, facts)
    first = next(iter(together))
    reference = together[first]
    if "adc" in together:
        together["adc"] = onto_grid(together["adc"], reference, "adc", facts)
        together["adc"] = _in_one_unit(together["adc"], reference, facts)
    if "flair" in together and first != "flair":
        together["flair"] = registered_onto(together["flair"], reference, "flair", facts)
    return together


def _in_one_unit(adc: Volume, reference: Volume, facts: Facts) -> Volume:
    """Bring an ADC map to 1e-6 mm2/s.

    The unit is read off the brain's median, about 800 in that unit: published maps come in it, in 1e-3 mm2/s and in
    mm2/s, a factor of 1000 apart each.

    Raises:
        UserError: there is nothing in the map.
    """
    values = adc.array[foreground(reference.array) & (adc.array > 0)]
    if values.size == 0:
        raise UserError("The ADC map has no positive value within the brain.")
    median = float(np.median(values))
    unit, factor = ("mm2/s", 1e6) if median < 0.025 else ("1e-3 mm2/s", 1e3) if median < 25 else ("1e-6 mm2/s", 1.0)
    facts |= {"adc_unit_found": unit, "adc_median_1e-6mm2/s": median * factor}
    if not 300 < median * factor < 3000:
        note(facts, f"CHECK: the median ADC of {median * factor:.0f}e-6 mm2/s is none of a brain")
    return adc.with_array(adc.array * np.float32(factor))


@command
def main() -> None:
    parser = make_parser(INFO, __doc__, EXAMPLE)
    arguments = parse(parser)
    channels = chosen_channels(arguments, INFO)
    cases, skipped = find_cases(arguments.i, channels, arguments.images_only, arguments.allow_missing)
    run(arguments, INFO, cases, skipped, prepare)


if __name__ == "__main__":
    main()
