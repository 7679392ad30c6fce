"""What a head consists of, voxel by voxel: tissue classes and coarse regions, from its fractions, not from an image."""

from __future__ import annotations

from typing import Literal

import numpy as np

from nnunet_ssl.phantom.anatomy import Anatomy

Kind = Literal["tissue", "lobes", "regions"]

TISSUES = ("csf", "cortical_grey", "white", "deep_grey", "ventricles")
LOBES = ("frontal", "parietal", "temporal", "occipital", "cerebellum", "brainstem")
REGIONS = (*(f"{side}_{lobe}" for side in ("left", "right") for lobe in LOBES[:-1]), "brainstem")

NAMES: dict[Kind, tuple[str, ...]] = {"tissue": TISSUES, "lobes": LOBES, "regions": REGIONS}
"""The classes of each kind of labels; the first is label 1, and 0 is what is none of them."""

_VENTRICLES_MM = 18.0  # CSF so far below the brain's surface is a ventricle's, as `anatomy` has it, or a cistern's
_DEEP_GREY_MM = 22.0  # grey matter so far below it belongs to the basal ganglia or the thalamus, or to the cingulum


def label_map(anatomy: Anatomy, kind: Kind) -> np.ndarray:
    """Return the labels of a kind, uint8 (X, Y, Z) on the anatomy's grid; :data:`NAMES` says what they are."""
    return {"tissue": tissue_labels, "lobes": lobe_labels, "regions": region_labels}[kind](anatomy)


def tissue_labels(anatomy: Anatomy) -> np.ndarray:
    """Return in each voxel of the brain the tissue that fills most of it, uint8 (X, Y, Z), as :data:`TISSUES` counts.

    Deep grey matter and ventricles are told from cortex and sulci by their depth below the brain's surface and their
    place in MNI space. Vessels count as the tissue around them, hyperintensities as white matter.
    """
    x, y, z = np.abs(anatomy.template_mm[0]), *anatomy.template_mm[1:]
    labels = np.argmax(_tissues(anatomy), axis=0).astype(np.uint8) + 1
    behind_the_third = (x < 8) & (y < -34)  # the cisterns between brainstem, cerebellum and splenium
    ventricles = (x < 36) & (y > -60) & (y < 36) & (z > -4) & (z < 28) & ~behind_the_third
    nuclei = (x < 32) & (y > -34) & (y < 24) & (z > -8) & (z < 20)
    labels[(labels == 1) & ventricles & (anatomy.depth_mm < -_VENTRICLES_MM)] = 1 + TISSUES.index("ventricles")
    labels[(labels == 2) & nuclei & (anatomy.depth_mm < -_DEEP_GREY_MM)] = 1 + TISSUES.index("deep_grey")
    return labels * anatomy.brain


def lobe_labels(anatomy: Anatomy) -> np.ndarray:
    """Return in each voxel of grey or white matter the lobe it lies in, uint8 (X, Y, Z), as :data:`LOBES` counts.

    Lobes end at planes in MNI space that follow the central sulcus, the Sylvian fissure, the parieto-occipital sulcus
    and the tentorium, by eye; what lies deep, such as the thalamus, belongs to the lobe on whose side of the planes it
    is.
    """
    x, y, z = anatomy.template_mm
    planes = {
        "brainstem": (np.abs(x) < 18) & (y > -46) & (y < -6) & (z < -6),
        "cerebellum": (y < -38) & (z < -16 + 0.2 * (y + 40)),
        "occipital": y < -64 - 0.27 * z,
        "temporal": (np.abs(x) > 18) & (y < 24) & (z < -8 + 0.55 * (15 - y)),
        "frontal": y > -8 - 0.4 * (z - 15),
    }
    numbers = [1 + LOBES.index(name) for name in planes]
    lobe = np.select(list(planes.values()), numbers, default=1 + LOBES.index("parietal")).astype(np.uint8)
    return lobe * (anatomy.brain & (np.argmax(_tissues(anatomy), axis=0) > 0))


def region_labels(anatomy: Anatomy) -> np.ndarray:
    """Return the lobes of each side, see :func:`lobe_labels`, uint8 (X, Y, Z), as :data:`REGIONS` counts.

    Left is the subject's left, x < 0 in MNI space and in the scan's RAS coordinates. Whoever mirrors images in training
    or prediction, as nnU-Net does by default, cannot tell sides.
    """
    lobe, sided = lobe_labels(anatomy), len(LOBES) - 1
    right = sided * (anatomy.template_mm[0] >= 0)
    return np.where(lobe > sided, len(REGIONS), np.where(lobe > 0, lobe + right, 0)).astype(np.uint8)


def _tissues(anatomy: Anatomy) -> np.ndarray:
    """Return the fractions of CSF, grey and white matter, (3, X, Y, Z)."""
    groups = (("csf", "meninges"), ("gm",), ("wm", "hyperintensity"))
    nothing = np.zeros(anatomy.grid.shape, dtype=np.float32)
    return np.stack([sum((anatomy.fractions.get(name, nothing) for name in group), nothing) for group in groups])
