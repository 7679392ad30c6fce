"""A labelled data set of nnU-Net without lesions: tissue classes or regions, of the same heads in any modality."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from nnunet_ssl.errors import UserError
from nnunet_ssl.phantom.acquisition import acquire, draw_quality
from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.contrast import MODALITIES
from nnunet_ssl.phantom.labels import NAMES, Kind, label_map
from nnunet_ssl.phantom.layouts.nifti import write_nifti
from nnunet_ssl.phantom.lesions import white_matter_hyperintensities


def write_tissue(
    folder: Path | str,
    *,
    n_train: int,
    n_test: int = 0,
    modalities: Sequence[str] = ("t1",),
    labels: Kind = "tissue",
    voxel_mm: float = 3.0,
    seed: int = 0,
) -> Path:
    """Write a synthetic data set as nnU-Net wants it in ``$nnUNet_raw``.

    With one `seed` and `voxel_mm`, cases of one name are the same head on the same grid whatever the modalities and
    labels are, and a modality's scan is the same in every data set: a model that learnt from T1 can be tested on FLAIR
    of the very heads that it was not shown.

    Args:
        folder: becomes the data set, ``DatasetNNN_Name``.
        n_train: cases of ``imagesTr`` and ``labelsTr``, ``phantom_001`` and so on.
        n_test: further cases, of ``imagesTs`` and ``labelsTs``.
        modalities: the channels, in order.
        labels: "tissue", "lobes" or "regions", see :mod:`nnunet_ssl.phantom.labels`.
        voxel_mm: voxel size; images and labels are skull-stripped, in RAS.
        seed: fixes everything.

    Returns:
        the folder.

    Raises:
        UserError: the folder's name is none of a data set.
    """
    folder = Path(folder)
    if not re.fullmatch(r"Dataset\d{3}_\w+", folder.name):
        raise UserError(f"{folder.name} is no data set's name to nnU-Net: name the folder DatasetNNN_Name.")
    for number in range(1, n_train + n_test + 1):
        part, case = ("Tr" if number <= n_train else "Ts"), f"phantom_{number:03d}"
        rng = np.random.default_rng([seed, number])
        person = draw_person(rng)
        anatomy = white_matter_hyperintensities(build_anatomy(person, mni_grid(voxel_mm)), rng, person.atrophy)
        write_nifti(
            folder / f"labels{part}" / f"{case}.nii.gz", label_map(anatomy, labels), anatomy.grid.affine, np.uint8
        )
        for channel, modality in enumerate(modalities):
            scan_rng = np.random.default_rng([seed, number, MODALITIES.index(modality)])
            image = acquire(anatomy, modality, draw_quality(scan_rng, stripped=True), scan_rng)
            unit = 1000 if modality == "adc" else 300
            path = folder / f"images{part}" / f"{case}_{channel:04d}.nii.gz"
            write_nifti(path, image * unit, anatomy.grid.affine)
    generate_dataset_json(
        str(folder),
        channel_names=dict(enumerate(modalities)),
        labels={"background": 0, **{name: value for value, name in enumerate(NAMES[labels], start=1)}},
        num_training_cases=n_train,
        file_ending=".nii.gz",
        description="Synthetic brains: no person was scanned",
        license="Apache-2.0",
        converted_by="nnunet_ssl.phantom",
    )
    return folder
