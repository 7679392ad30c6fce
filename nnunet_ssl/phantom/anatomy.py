"""One subject's head: tissue fractions on a grid, warped from the MNI152 maps by the subject's own deformation."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nnunet_ssl.errors import UserError
from nnunet_ssl.phantom.fields import Axes, Box, bspline, random_coefficients, random_field, refine

MNI_BOX = ((-98.0, 98.0), (-134.0, 98.0), (-72.0, 116.0))
"""The field of view of the MNI152 template in mm, from the centre of the first voxel to that of the last."""

_COARSE_MM = 4.0  # the deformation is computed on this grid
_CENTRE_MM = np.array([0.0, -18.0, 10.0])  # about the middle of the brain


@dataclass(frozen=True, kw_only=True)
class Person:
    """What sets one subject's anatomy apart; `seed` fixes everything that `age` does not change."""

    seed: tuple[int, ...]
    age: int
    sex: Literal["M", "F"]
    atrophy: float

    def older(self, years: int) -> Person:
        """Return the same person at a later visit: the same folds, slightly wider sulci and ventricles."""
        return replace(self, age=self.age + years, atrophy=self.atrophy + 0.02 * years)


@dataclass(frozen=True)
class Grid:
    """An axis-aligned RAS grid: where the planes lie, in mm."""

    axes: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.axes
        return len(x), len(y), len(z)

    @property
    def spacing(self) -> tuple[float, float, float]:
        x, y, z = (float(axis[1] - axis[0]) for axis in self.axes)
        return x, y, z

    @property
    def affine(self) -> np.ndarray:
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = [axis[0] for axis in self.axes]
        return affine

    @property
    def voxel_ml(self) -> float:
        return math.prod(self.spacing) / 1000


@dataclass(frozen=True)
class Anatomy:
    """Tissue fractions of one head on a grid.

    Attributes:
        grid: the grid.
        fractions: tissue name -> float32 (X, Y, Z); they sum to at most 1, the rest is air.
        template_mm: float32 (3, X, Y, Z), where each voxel lies in MNI space.
        depth_mm: float32 (X, Y, Z), distance to the brain's surface in mm, negative inside.
    """

    grid: Grid
    fractions: dict[str, np.ndarray]
    template_mm: np.ndarray
    depth_mm: np.ndarray

    @property
    def brain(self) -> np.ndarray:
        """Return the mask of brain and the CSF within it, as a careful skull-stripping leaves it."""
        return self.depth_mm < 0.5

    def with_tissues(self, added: dict[str, np.ndarray]) -> Anatomy:
        """Return the anatomy with `added` fractions that displace what was there in proportion."""
        total = np.clip(sum(added.values()), 0, 1)
        fractions = {name: fraction * (1 - total) for name, fraction in self.fractions.items()}
        for name, fraction in added.items():
            fractions[name] = fractions.get(name, 0) + fraction
        return replace(self, fractions=fractions)

    def with_changed(self, share: np.ndarray, into: dict[str, str]) -> Anatomy:
        """Return the anatomy in which a `share` (X, Y, Z) of some tissues turned into others: {healthy: diseased}."""
        fractions = dict(self.fractions)
        for healthy, diseased in into.items():
            fractions[diseased] = share * self.fractions[healthy]
            fractions[healthy] = self.fractions[healthy] - fractions[diseased]
        return replace(self, fractions=fractions)


def mni_grid(voxel_mm: float) -> Grid:
    """Return the template's own grid (197 x 233 x 189 at 1 mm) at another voxel size."""
    return box_grid(MNI_BOX, (voxel_mm,) * 3)


def box_grid(box: Box, spacing: Sequence[float]) -> Grid:
    """Return the grid that fills `box` ((low, high) per axis, mm) from its lower corner with the given spacing."""
    x, y, z = (np.arange(low, high + 1e-6, step) for (low, high), step in zip(box, spacing, strict=True))
    return Grid((x, y, z))


def draw_person(rng: np.random.Generator, *, ages: tuple[int, int] = (20, 85)) -> Person:
    """Draw a subject. Atrophy (0 young ... 1 old) grows with age, so that age can be read off the anatomy."""
    age = int(rng.integers(ages[0], ages[1] + 1))
    atrophy = float(np.clip((age - 40) / 45, 0, 1) + 0.1 * rng.standard_normal())
    sex: Literal["M", "F"] = "M" if rng.random() < 0.5 else "F"
    return Person(seed=tuple(rng.integers(0, 2**32, 4).tolist()), age=age, sex=sex, atrophy=atrophy)


def build_anatomy(person: Person, grid: Grid, *, pose: bool = True) -> Anatomy:
    """Warp the template's tissues into `person`'s head on `grid`.

    Args:
        person: the subject; the same person gives the same anatomy on every grid.
        grid: where the fractions are wanted.
        pose: give the head its own rotation and size; False keeps it as registered to MNI.

    Raises:
        UserError: nilearn is missing.
    """
    rng = np.random.default_rng(person.seed)
    template = _template(max(1, int(min(grid.spacing))))
    where = _template_coordinates(rng, person, grid.axes, pose)
    index = (where - template.origin[:, None, None, None]) / template.step

    def sample(volume: np.ndarray, outside: float = 0.0) -> np.ndarray:
        return ndimage.map_coordinates(volume, index, order=1, mode="constant", cval=outside)

    depth = sample(template.depth, outside=60.0)
    tissues = _vary_cortex(rng, person, grid.axes, {name: sample(volume) for name, volume in template.tissues.items()})
    vessels = _vessels(rng, grid.axes, where, depth)
    fractions = tissues | _head(rng, grid.axes, where, depth, np.subtract(1, sum(tissues.values())))
    return Anatomy(grid, fractions, where, depth).with_tissues({"vessel": vessels})


@dataclass(frozen=True)
class _Template:
    tissues: dict[str, np.ndarray]
    ventricles: np.ndarray
    depth: np.ndarray
    origin: np.ndarray
    step: int


@functools.lru_cache(maxsize=2)
def _template(step: int) -> _Template:
    """Load nilearn's MNI152 maps, averaged over blocks of `step` voxels of 1 mm."""
    try:
        from nilearn import datasets
    except ModuleNotFoundError as error:
        if error.name != "nilearn":  # it is there, but something that it needs is not
            raise
        raise UserError(
            "The synthetic brains are warped from the MNI152 template that the package nilearn carries, and nilearn is "
            "not installed. Install it with: pip install 'nnunet_ssl[demo]'"
        ) from error
    loaded = [datasets.load_mni152_brain_mask, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template]
    brain, gm, wm = (_block_mean(np.asarray(load(resolution=1).dataobj, dtype=np.float32), step) for load in loaded)
    csf = np.clip(brain - gm - wm, 0, 1)
    outside = ndimage.distance_transform_edt(brain < 0.5) * step
    inside = ndimage.distance_transform_edt(brain >= 0.5) * step
    depth = ndimage.gaussian_filter((outside - inside).astype(np.float32), 1.5 / step)
    origin = np.array([low for low, _ in MNI_BOX]) + (step - 1) / 2
    return _Template({"csf": csf, "gm": gm, "wm": wm}, csf * (depth < -18), depth, origin, step)


def _block_mean(volume: np.ndarray, step: int) -> np.ndarray:
    if step == 1:
        return volume
    volume = np.pad(volume, [(0, -size % step) for size in volume.shape])
    blocks = [part for size in volume.shape for part in (size // step, step)]
    return volume.reshape(blocks).mean(axis=(1, 3, 5))


def _template_coordinates(rng: np.random.Generator, person: Person, axes: Axes, pose: bool) -> np.ndarray:
    """Return where in MNI space each voxel of the subject comes from, float32 (3, X, Y, Z) in mm.

    The random part is a sum of two B-spline displacements whose coefficients stay below 0.4 of the knot distance in
    all, which keeps the map one-to-one (Choi and Lee 2000, injectivity of 3-D uniform cubic B-splines).
    """
    coarse_axes = [np.arange(low, high + _COARSE_MM, _COARSE_MM) for low, high in MNI_BOX]
    mesh = np.stack(np.meshgrid(*coarse_axes, indexing="ij"))
    points = mesh - _CENTRE_MM[:, None, None, None]
    size = 0.94 + (0.025 if person.sex == "M" else -0.025) + rng.normal(0, 0.015, 3)
    angles = rng.normal(0, 0.07, 3)  # the MNI template is larger than most heads: 0.94
    if pose:
        matrix = Rotation.from_euler("xyz", angles).as_matrix() / size
        points = np.einsum("ij,jxyz->ixyz", matrix, points)
    points = points + _CENTRE_MM[:, None, None, None]
    for knot_mm, spread, limit in ((42.0, 0.16, 0.25), (18.0, 0.07, 0.15)):
        for axis in range(3):
            coefficients = random_coefficients(rng, MNI_BOX, knot_mm) * spread
            coefficients = np.clip(coefficients, -limit, limit) * knot_mm
            points[axis] += bspline(coefficients, MNI_BOX, knot_mm, coarse_axes)
    widening_mm = float(np.clip(-1.0 + 4.0 * person.atrophy + rng.normal(0, 0.8), -2.0, 4.5))
    points += widening_mm * _towards_ventricles(points)
    box = [(low, high) for low, high in MNI_BOX]
    return np.stack([refine(component, box, _COARSE_MM, axes) for component in points])


def _towards_ventricles(points: np.ndarray) -> np.ndarray:
    """Return at each point (mm) a vector towards the ventricles, 1 long where the pull is strongest."""
    template = _template(3)
    smooth = ndimage.gaussian_filter(template.ventricles, 7 / template.step)
    index = (points - template.origin[:, None, None, None]) / template.step
    pull = np.stack([ndimage.map_coordinates(part, index, order=1) for part in np.gradient(smooth)])
    return pull / np.linalg.norm(np.gradient(smooth), axis=0).max()


def _vary_cortex(
    rng: np.random.Generator, person: Person, axes: Axes, tissues: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Sharpen the population's average tissue maps into one subject's, with sulci and cortex of its own width."""
    bias: dict[str, np.ndarray | float] = {
        "csf": 0.3 + 1.2 * person.atrophy + 0.8 * random_field(rng, axes, 9.0, MNI_BOX),
        "gm": -0.4 + 0.35 * random_field(rng, axes, 14.0, MNI_BOX),
        "wm": 0.0,
    }
    weighted = {name: fraction**2.0 * np.exp(bias[name]) for name, fraction in tissues.items()}
    brain = np.clip(sum(tissues.values()), 0, 1)
    scale = brain / np.maximum(sum(weighted.values()), 1e-6)
    return {name: fraction * scale for name, fraction in weighted.items()}


def _head(
    rng: np.random.Generator, axes: Axes, where: np.ndarray, depth: np.ndarray, room: np.ndarray
) -> dict[str, np.ndarray]:
    """Return meninges, skull, scalp, orbits, face and neck: layers around the brain and simple solids.

    The meninges follow the brain's own surface, skull and scalp its hull, with bone between the two at the base.

    Args:
        rng: fixes how thick the layers are, and the texture of the soft tissue.
        axes: the grid's coordinates in mm.
        where: (3, X, Y, Z), where each voxel lies in MNI space.
        depth: (X, Y, Z), distance to the brain's surface in mm.
        room: (X, Y, Z), what the brain's tissues leave of each voxel.
    """
    csf_mm, bone_mm, scalp_mm = rng.uniform(2.0, 3.5), rng.uniform(5.0, 7.5), rng.uniform(5.0, 9.0)
    skull_mm = csf_mm + bone_mm
    hull = np.minimum(_hull_depth(where), depth)
    face, nose, eyes, orbits = _face(where)
    soft = np.maximum(_between(hull, skull_mm, skull_mm + scalp_mm), face * _above(hull, skull_mm)) * (1 - nose)
    streaks = np.clip(0.25 + 0.3 * random_field(rng, axes, 7.0, MNI_BOX), 0, 0.8)
    fat_share = np.maximum(_between(hull, skull_mm, skull_mm + scalp_mm - 2.0), streaks)
    bone = _above(depth, csf_mm) * (1 - _above(hull, skull_mm))
    marrow = bone * np.maximum(_between(hull, csf_mm + 0.3 * bone_mm, csf_mm + 0.7 * bone_mm), hull < csf_mm)
    marrow *= 0.85
    outside_orbits = (1 - eyes) * (1 - orbits)
    layers = {
        "meninges": 1 - _above(depth, csf_mm),
        "bone": (bone - marrow) * outside_orbits,
        "fat": (fat_share * soft + 0.45 * marrow) * outside_orbits + orbits * _above(depth, csf_mm) * (1 - eyes),
        "muscle": ((1 - fat_share) * soft + 0.55 * marrow) * outside_orbits,
        "vitreous": eyes * _above(depth, csf_mm),
    }
    return {name: np.clip(layer, 0, 1) * np.clip(room, 0, 1) for name, layer in layers.items()}


def _face(where: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return solids in MNI space, each between 0 and 1: face and neck, the nasal cavity, the eyes, their orbits."""
    x, y, z = where

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float], edge: float) -> np.ndarray:
        mirrored = np.abs(x) - centre[0], y - centre[1], z - centre[2]
        distance = np.sqrt(sum((part / radius) ** 2 for part, radius in zip(mirrored, radii)))
        return np.clip((1 - distance) * min(radii) / edge + 0.5, 0, 1)

    face = np.maximum(ellipsoid((0, 22, -62), (74, 82, 62), 2.0), ellipsoid((0, -42, -92), (62, 62, 72), 2.0))
    nose = ellipsoid((7, 62, -56), (5, 30, 18), 1.5)
    return face, nose, ellipsoid((32, 58, -40), (12, 12, 12), 1.5), ellipsoid((31, 50, -40), (17, 24, 16), 3.0)


@functools.lru_cache(maxsize=1)
def _hull() -> np.ndarray:
    """Return the distance (mm) to the brain's surface closed over clefts of 2 x 25 mm, on the 3 mm template."""
    template = _template(3)
    step, width_mm = template.step, 25.0
    margin = int(np.ceil(width_mm / step)) + 1
    away = np.pad(template.depth, margin, mode="edge")  # edge: the neck goes on below the field of view
    dilated = ndimage.distance_transform_edt(away >= 0) * step < width_mm
    outside = ndimage.distance_transform_edt(~dilated) * step
    inside = ndimage.distance_transform_edt(dilated) * step
    hull = ndimage.gaussian_filter(outside - inside + width_mm, 2.0)
    return hull[(slice(margin, -margin),) * 3].astype(np.float32)


def _hull_depth(where: np.ndarray) -> np.ndarray:
    """Return the distance in mm to the brain's hull at points `where` (3, X, Y, Z) of MNI space, negative inside."""
    template = _template(3)
    index = (where - template.origin[:, None, None, None]) / template.step
    return ndimage.map_coordinates(_hull(), index, order=1, mode="nearest")


def _vessels(rng: np.random.Generator, axes: Axes, where: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return thin tortuous vessels near the surface (where two random fields vanish) and the sagittal sinus."""
    first, second = (random_field(rng, axes, 9.0, MNI_BOX) for _ in range(2))
    tubes = np.exp(-(first**2 + second**2) / (2 * 0.13**2)) * _between(depth, -14.0, 1.0)
    x, y, z = where
    sinus = np.exp(-((x / 3.0) ** 2) / 2) * _between(depth, -1.0, 4.0) * np.clip((z + 0.5 * y - 5) / 20 + 0.5, 0, 1)
    sinus = sinus * (z > -5)
    return np.clip(0.8 * tubes + sinus, 0, 0.95)


def _above(depth: np.ndarray, start: float, edge_mm: float = 1.2) -> np.ndarray:
    return np.clip((depth - start) / edge_mm + 0.5, 0, 1)


def _between(depth: np.ndarray, start: float, stop: float) -> np.ndarray:
    return _above(depth, start) * (1 - _above(depth, stop))
