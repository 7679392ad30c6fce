"""From a noise-free image to a scan: another grid, thick slices, texture, bias field, Rician noise, skull-stripping."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nnunet_ssl.phantom.anatomy import MNI_BOX, Anatomy
from nnunet_ssl.phantom.contrast import render
from nnunet_ssl.phantom.fields import random_field


@dataclass(frozen=True)
class ScanGrid:
    """The grid of a scan: its shape and its voxel-to-world affine, oblique or flipped as it may be."""

    shape: tuple[int, int, int]
    affine: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a scan is made.

    Attributes:
        noise: standard deviation of the noise, grey matter being about 1.
        bias: strength of the bias field (standard deviation of its logarithm).
        texture: relative variation of the tissue at a scale of a few mm.
        thickness_mm: slice thickness; None = the grid's own voxel size.
        slice_axis: the anatomical axis across the slices (0 sagittal, 1 coronal, 2 axial).
        stripped: set everything outside the brain to zero.
    """

    noise: float = 0.03
    bias: float = 0.12
    texture: float = 0.03
    thickness_mm: float | None = None
    slice_axis: int = 2
    stripped: bool = False


def draw_quality(rng: np.random.Generator, *, thick: bool = False, stripped: bool = False) -> Quality:
    """Draw a usual quality; `thick` means 4-5.5 mm axial slices."""
    return Quality(
        noise=float(rng.uniform(0.015, 0.045)),
        bias=float(rng.uniform(0.05, 0.18)),
        thickness_mm=float(rng.uniform(4.0, 5.5)) if thick else None,
        stripped=stripped,
    )


def acquire(
    anatomy: Anatomy, modality: str, quality: Quality, rng: np.random.Generator, grid: ScanGrid | None = None
) -> np.ndarray:
    """Scan an anatomy.

    Args:
        anatomy: the head.
        modality: one of `contrast.MODALITIES`.
        quality: noise, bias and so on.
        rng: fixes protocol, bias field and noise of this scan.
        grid: where the scan is wanted; None = the anatomy's own grid.

    Returns:
        float32 (X, Y, Z); grey matter is about 1 (adc: in 1e-3 mm2/s, may be slightly negative outside tissue).
    """
    image = noiseless(anatomy, modality, quality, rng, grid)
    brain = anatomy.brain.astype(np.float32)
    if grid is not None:
        brain = resample_onto_scan(brain, anatomy.grid.affine, grid)
    axes = [np.arange(size) * 200.0 / max(size - 1, 1) for size in image.shape]
    noise = noise_of(modality, quality)
    if modality == "adc":
        image = image + (noise * rng.standard_normal(image.shape, dtype=np.float32))
    else:
        image = image * np.exp(quality.bias * random_field(rng, axes, 70.0))
        image = _rician(image, noise, rng)
    return image * (brain > 0.5) if quality.stripped else image


def noiseless(
    anatomy: Anatomy, modality: str, quality: Quality, rng: np.random.Generator, grid: ScanGrid | None = None
) -> np.ndarray:
    """Return what :func:`acquire` scans before bias field, noise and stripping; same arguments, same `rng`."""
    image = render(anatomy, modality, rng)
    image *= 1 + quality.texture * random_field(rng, anatomy.grid.axes, 3.5, MNI_BOX)
    image = blur_slices(image, anatomy, quality)
    return image if grid is None else resample_onto_scan(image, anatomy.grid.affine, grid)


def noise_of(modality: str, quality: Quality) -> float:
    """Return the standard deviation of a scan's noise, in the units of :func:`acquire`; an ADC map averages scans."""
    return 0.5 * quality.noise if modality == "adc" else quality.noise


def blur_slices(image: np.ndarray, anatomy: Anatomy, quality: Quality) -> np.ndarray:
    """Blur across the slices as a slice profile of the given thickness does."""
    spacing = anatomy.grid.spacing[quality.slice_axis]
    if quality.thickness_mm is None or quality.thickness_mm <= spacing:
        return image
    sigma = np.sqrt(quality.thickness_mm**2 - spacing**2) / 2.355 / spacing
    return ndimage.gaussian_filter1d(image, sigma, axis=quality.slice_axis)


def resample_onto_scan(image: np.ndarray, affine: np.ndarray, grid: ScanGrid, order: int = 1) -> np.ndarray:
    """Resample an image onto a scan's grid; 0 outside."""
    to_source = np.linalg.inv(affine) @ grid.affine
    return ndimage.affine_transform(image, to_source[:3, :3], to_source[:3, 3], grid.shape, order=order)


def scan_grid(
    anatomy: Anatomy,
    spacing: tuple[float, float, float],
    *,
    orientation: str = "RAS",
    tilt: tuple[float, float, float] = (0.0, 0.0, 0.0),
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> ScanGrid:
    """Return a grid that covers the anatomy's field of view.

    Args:
        anatomy: whose field of view to cover.
        spacing: voxel size in mm along the anatomical x, y and z.
        orientation: storage orientation, such as "LAS".
        tilt: obliqueness, Euler angles in degrees about x, y and z.
        shift_mm: how far the grid's centre lies from the anatomy's.
    """
    low = np.array([axis[0] for axis in anatomy.grid.axes])
    high = np.array([axis[-1] for axis in anatomy.grid.axes])
    shape = np.maximum(np.floor((high - low) / spacing).astype(int) + 1, 2)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (low + high) / 2 + shift_mm - affine[:3, :3] @ ((shape - 1) / 2)
    ornt = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), nib.orientations.axcodes2ornt(orientation))
    i, j, k = (int(shape[int(np.where(ornt[:, 0] == axis)[0][0])]) for axis in range(3))
    return ScanGrid((i, j, k), affine @ nib.orientations.inv_ornt_aff(ornt, tuple(shape)))


def move(
    affine: np.ndarray, rotation_deg: tuple[float, float, float], shift_mm: tuple[float, float, float]
) -> np.ndarray:
    """Return `affine` as a head that turned by `rotation_deg` about the brain and moved by `shift_mm` would need it."""
    centre = np.array([0.0, -18.0, 10.0])
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", rotation_deg, degrees=True).as_matrix()
    motion[:3, 3] = centre + np.asarray(shift_mm) - motion[:3, :3] @ centre
    return motion @ affine


def _rician(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    real, imaginary = (sigma * rng.standard_normal(image.shape, dtype=np.float32) for _ in range(2))
    return np.hypot(image + real, imaginary)
