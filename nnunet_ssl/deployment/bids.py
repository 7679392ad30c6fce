"""From a BIDS data set to BIDS derivatives: a mask and a probability map beside where each session's image lies."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from nnunet_ssl import __version__
from nnunet_ssl.conversion.dataset import NO_PLACE_TO_WRITE
from nnunet_ssl.corpus.layouts import find_scans
from nnunet_ssl.corpus.modalities import UNKNOWN
from nnunet_ssl.deployment.resources import measured
from nnunet_ssl.deployment.segmenting import Segmenter
from nnunet_ssl.errors import UserError, one_line
from nnunet_ssl.imaging.metaimage import read_image, write_image

BIDS_VERSION = "1.10.0"

logger = logging.getLogger(__name__)


def segment_dataset(model: Segmenter, source: Path, target: Path) -> int:
    """Segment every session of a BIDS data set that has the model's contrasts; return the number of failures.

    Of several scans of one contrast the first counts. A session that is done is not done again.

    Raises:
        UserError: it is no BIDS data set, or no session has what the model needs.
    """
    sessions = list(_sessions(model, source))
    if not sessions:
        raise UserError(f"No session in {source} has the contrasts that the model needs: {', '.join(model.channels)}.")
    _describe(source, target)
    failures = 0
    for images in sessions:
        stem = target / images[0].relative_to(source).parent / _derived_stem(images[0])
        mask, shown = (
            stem.with_name(f"{stem.name}_{kind}.nii.gz") for kind in ("label-lesion_mask", "label-lesion_probseg")
        )
        if mask.is_file() and shown.is_file():
            continue
        try:
            with measured() as used:
                result = model.segment([read_image(image) for image in images])
            values = model.calibrated(result.probabilities.array)
            write_image(shown, result.probabilities.with_array(values))
            sources = [f"bids::{image.relative_to(source)}" for image in images]
            about = {"Type": "Lesion", "Sources": sources, "VolumeMl": result.volume_ml}
            if result.volume_interval_ml is not None:
                about |= {"VolumeIntervalMl": result.volume_interval_ml, "VolumeIntervalCoverage": result.coverage}
            mask.with_name(f"{stem.name}_label-lesion_mask.json").write_text(json.dumps(about, indent=2) + "\n")
            write_image(mask, result.labels)
            logger.info("%s: %s; %s", mask.relative_to(target), result.describe_volume(), ", ".join(used))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_PLACE_TO_WRITE:
                raise
            failures += 1
            logger.error("failed: %s", one_line(error), exc_info=not isinstance(error, UserError))
    return failures


def _sessions(model: Segmenter, source: Path) -> Iterator[list[Path]]:
    """Yield the images of each session that has all the channels, in their order."""
    scans = find_scans(source, "bids")
    scans = scans[scans["modality"] != UNKNOWN].sort_values(["session", "repeat"])
    for session, rows in scans.drop_duplicates(["session", "modality"]).groupby("session"):
        images: pd.Series = rows.set_index("modality")["path"]
        try:
            yield [Path(path) for path in model.choose(images.to_dict())]
        except UserError as error:
            logger.info("%s is left out. %s", session, error)


def _derived_stem(image: Path) -> str:
    """Return an image's name without its suffix: of ``sub-1_ses-1_T1w.nii.gz`` it is ``sub-1_ses-1``."""
    return image.name.split(".")[0].rpartition("_")[0]


def _describe(source: Path, target: Path) -> None:
    description = {
        "Name": f"Lesions in {source.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "nnunet_ssl", "Version": __version__}],
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
