"""Brain masks by HD-BET (optional), and telling whether a scan needs one.

HD-BET (Isensee et al. 2019, doi 10.1002/hbm.24750) is an nnU-Net for T1, contrast-enhanced T1, T2 and FLAIR.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from nnunet_ssl.errors import UserError

logger = logging.getLogger(__name__)

STRIPPED_MAXIMUM_ML = 2200.0
"""More tissue than this is no bare brain: intracranial volumes reach about 2 l, whole heads start near 3 l."""

STRIPPED_MAXIMUM_BORDER = 0.02
"""A stripped image is zero on its faces; in a head scan the neck or the noise of the air reaches them."""


def looks_stripped(data: np.ndarray, voxel_mm3: float) -> bool:
    """Tell whether the skull is gone from an image (X, Y, Z): little is not zero, and next to nothing at its faces.

    A heuristic, made for whole-head fields of view: a thin slab of a head can pass for a stripped brain.
    """
    tissue = data != 0
    faces = [face for axis in range(3) for face in (tissue.take(0, axis), tissue.take(-1, axis))]
    at_border = sum(int(face.sum()) for face in faces) / sum(face.size for face in faces)
    return at_border <= STRIPPED_MAXIMUM_BORDER and tissue.sum() * voxel_mm3 / 1000 <= STRIPPED_MAXIMUM_ML


def brain_mask(image: nibabel.Nifti1Image, device: str = "cpu") -> np.ndarray:
    """Segment the brain in a T1, contrast-enhanced T1, T2 or FLAIR image with HD-BET.

    Args:
        image: a 3-D image in any orientation.
        device: "cpu", "cuda", "cuda:1", ...; about ten seconds on a GPU, minutes on a CPU.

    Returns:
        A boolean mask of the image's shape.

    Raises:
        UserError: HD-BET or its weights are missing; the message says how to get them.
    """
    canonical = nibabel.as_closest_canonical(image)
    data = canonical.get_fdata(dtype=np.float32).transpose(2, 1, 0)[None]
    properties = {"spacing": [float(size) for size in canonical.header.get_zooms()[2::-1]]}
    with _contained():
        segmentation = _predictor(device).predict_single_npy_array(data, properties)
    mask = (np.asarray(segmentation) > 0).transpose(2, 1, 0).astype(np.uint8)
    to_original = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.io_orientation(image.affine)
    )
    return nibabel.Nifti1Image(mask, canonical.affine).as_reoriented(to_original).get_fdata() > 0


def require_hd_bet() -> None:
    """Make sure that HD-BET is installed and its weights are there; download them if need be.

    Raises:
        UserError: one of them is missing and cannot be got from here; the message says how to get it.
    """
    if importlib.util.find_spec("HD_BET") is None:
        raise UserError('HD-BET is not installed. Skull-stripping needs it: pip install "nnunet_ssl[skullstrip]"')
    with _contained():
        from HD_BET.checkpoint_download import maybe_download_parameters
        from HD_BET.paths import ZENODO_DOWNLOAD_URL, folder_with_parameter_files
    weights = Path(folder_with_parameter_files)
    if (weights / "fold_all" / "checkpoint_final.pth").is_file():
        return
    logger.info("Downloading HD-BET's weights to %s", weights)
    try:
        with _contained():
            maybe_download_parameters()
    except (OSError, TypeError, zipfile.BadZipFile) as error:  # TypeError: it was told no length of the file
        raise UserError(
            f"HD-BET is installed, but its weights are not in {weights}, and they could not be downloaded "
            f"({type(error).__name__}). On a machine with internet access, run `hd-bet` once, or unpack "
            f"{ZENODO_DOWNLOAD_URL} there, and copy the folder to the same place here."
        ) from error


@functools.lru_cache(maxsize=1)
def _predictor(device: str) -> Any:
    require_hd_bet()
    with _contained():
        from HD_BET.hd_bet_prediction import get_hdbet_predictor

        from nnunet_ssl.devices import find_device

        return get_hdbet_predictor(use_tta=False, device=find_device(device))


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Undo what HD-BET does to its process: it replaces sys.stdout, sets nnUNet_compile and torch's threads, prints."""
    import torch

    stdout, environment, threads = sys.stdout, dict(os.environ), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.stdout = stdout
        torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
