"""Lesions that belong to a brain: irregular, bounded by hemisphere, territory and tissue, made of several tissues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nnunet_ssl.phantom.anatomy import MNI_BOX, Anatomy
from nnunet_ssl.phantom.fields import random_field


@dataclass(frozen=True)
class Territory:
    """Where strokes happen: a point in MNI space (right side, mm), how often, and how large they grow (ml)."""

    name: str
    centre_mm: tuple[float, float, float]
    weight: float
    largest_ml: float


# Centres read off an atlas of the arterial territories (Tatu 1998), by eye; the middle cerebral artery leads.
TERRITORIES = (
    Territory("middle cerebral artery, superior", (48, 4, 28), 0.27, 150),
    Territory("middle cerebral artery, inferior", (54, -38, 16), 0.22, 120),
    Territory("lenticulostriate arteries", (24, 4, 6), 0.18, 25),
    Territory("anterior cerebral artery", (10, 34, 36), 0.08, 60),
    Territory("posterior cerebral artery", (20, -80, 6), 0.11, 60),
    Territory("thalamus", (14, -18, 8), 0.05, 6),
    Territory("cerebellum", (26, -64, -38), 0.09, 40),
)


def chronic_stroke(anatomy: Anatomy, rng: np.random.Generator, volume_ml: float) -> tuple[Anatomy, np.ndarray]:
    """Put an old infarct into a brain: a CSF-like cavity with septa in the depth of it, a gliotic rim around.

    Args:
        anatomy: the head.
        rng: fixes place and shape.
        volume_ml: the volume aimed at; territories that can't hold as much give a smaller lesion.

    Returns:
        the anatomy with the lesion, and its mask, bool (X, Y, Z).
    """
    territory = _draw_territory(rng, volume_ml)
    level = _grow(anatomy, rng, _mirror(territory.centre_mm, rng), min(volume_ml, territory.largest_ml), territory)
    rim_mm = rng.uniform(2.0, 5.0)
    septa = 1.2 * random_field(rng, anatomy.grid.axes, 5.0, MNI_BOX)
    extent = _soft(level, anatomy)
    core = extent * np.clip((level - rim_mm + septa) / 2.0 + 0.5, 0, 1)
    changed = anatomy.with_tissues({"cavity": core, "gliosis": extent - core})
    return changed, level > 0


def acute_stroke(anatomy: Anatomy, rng: np.random.Generator, volume_ml: float) -> tuple[Anatomy, np.ndarray]:
    """Put a fresh infarct into a brain: one main lesion and, as emboli do, often some small ones in its territory.

    Arguments and return value as for :func:`chronic_stroke`.
    """
    territory = _draw_territory(rng, volume_ml)
    side = _mirror((1.0, 1.0, 1.0), rng)[0]
    parts = [1.0] if rng.random() < 0.5 else [0.7, *(0.3 * rng.dirichlet(np.ones(rng.integers(2, 6))))]
    level = np.full(anatomy.grid.shape, -np.inf, dtype=np.float32)
    for i, part in enumerate(parts):
        spread = 5.0 if i == 0 else 16.0
        centre = np.array(territory.centre_mm) * (side, 1, 1) + rng.normal(0, spread, 3)
        goal = max(min(volume_ml, territory.largest_ml) * part, 3 * anatomy.grid.voxel_ml)
        level = np.maximum(level, _grow(anatomy, rng, centre, goal, territory))
    extent = _soft(level, anatomy)
    patchy = 0.45 + 0.6 * random_field(rng, anatomy.grid.axes, 4.0, MNI_BOX)
    share = extent * np.clip(level / 3.0 + patchy, 0.5, 1)
    return anatomy.with_changed(share, {"gm": "infarcted_gm", "wm": "infarcted_wm"}), level > 0


def focal_dysplasia(anatomy: Anatomy, rng: np.random.Generator, volume_ml: float) -> tuple[Anatomy, np.ndarray]:
    """Put a focal cortical dysplasia (type II) into a brain: a thick, blurred piece of cortex, faint on every contrast.

    Arguments and return value as for :func:`chronic_stroke`.
    """
    _, y, z = anatomy.template_mm
    cortex = (anatomy.fractions["gm"] > 0.5) & (anatomy.depth_mm > -16) & (z > -20) & (y > -70)
    places = np.argwhere(cortex)
    centre = anatomy.template_mm[(slice(None), *places[rng.integers(len(places))])]
    tissue = 1.2 * anatomy.fractions["gm"] + 0.5 * anatomy.fractions["wm"]
    level = _grow(anatomy, rng, centre, volume_ml, preference=lambda: 5.0 * (tissue - 0.8))
    strength = rng.uniform(0.45, 0.85)
    return anatomy.with_tissues({"dysplasia": strength * _soft(level, anatomy, edge_mm=3.0)}), level > 0


def white_matter_hyperintensities(anatomy: Anatomy, rng: np.random.Generator, load: float) -> Anatomy:
    """Add the caps and spots around the ventricles that age brings; `load` 0 (none) ... 1 (much)."""
    wm = anatomy.fractions["wm"]
    ventricles = anatomy.fractions["csf"] * (anatomy.depth_mm < -18)
    spacing = np.array(anatomy.grid.spacing)
    near = ndimage.gaussian_filter(ventricles, 5.0 / spacing)
    near = near / max(float(near.max()), 1e-6)
    spots = random_field(rng, anatomy.grid.axes, 4.0, MNI_BOX)
    level = 2.5 * near + 0.7 * spots - (2.6 - 1.2 * load)
    return anatomy.with_tissues({"hyperintensity": 0.8 * wm * np.clip(4 * level, 0, 1)})


def lesion_volume(
    rng: np.random.Generator, *, median_ml: float, spread: float, smallest_ml: float, largest_ml: float
) -> float:
    """Draw a volume in ml from a log-normal distribution (`spread`: standard deviation of the logarithm), cut off."""
    return float(np.clip(median_ml * np.exp(spread * rng.standard_normal()), smallest_ml, largest_ml))


def _draw_territory(rng: np.random.Generator, volume_ml: float) -> Territory:
    fitting = [territory for territory in TERRITORIES if territory.largest_ml >= volume_ml] or list(TERRITORIES[:1])
    weights = np.array([territory.weight for territory in fitting])
    return fitting[rng.choice(len(fitting), p=weights / weights.sum())]


def _mirror(point_mm: tuple[float, float, float], rng: np.random.Generator) -> tuple[float, float, float]:
    x, y, z = point_mm
    return (x if rng.random() < 0.5 else -x), y, z


def _grow(
    anatomy: Anatomy,
    rng: np.random.Generator,
    centre_mm: tuple[float, float, float] | np.ndarray,
    volume_ml: float,
    territory: Territory | None = None,
    preference: Callable[[], np.ndarray | np.float32] = lambda: np.float32(0),
) -> np.ndarray:
    """Grow a lesion from a point in MNI space until it has its volume.

    The front follows an ellipsoid that points to the surface (infarcts are wedges), warped by noise at two scales,
    and stays inside one hemisphere, one arterial territory and the tissue.

    Returns:
        float32 (X, Y, Z): about the depth below the lesion's surface in mm, positive inside.
    """
    centre = np.asarray(centre_mm) + (rng.normal(0, 4, 3) if territory else 0)
    radius = (3 * volume_ml * 1000 / (4 * np.pi)) ** (1 / 3)
    offset = np.moveaxis(anatomy.template_mm, 0, -1) - centre
    radial, _ = Rotation.align_vectors([centre - (0, -18, 10)], [[1.0, 0, 0]])
    axes = np.exp(rng.normal(0, 0.2, 3)) * (1.25, 1.0, 0.9)
    distance = np.linalg.norm((offset @ radial.as_matrix()) / axes, axis=-1)
    grid_axes = anatomy.grid.axes
    noise = 0.40 * random_field(rng, grid_axes, max(0.7 * radius, 6.0), MNI_BOX)
    noise += 0.22 * random_field(rng, grid_axes, max(0.3 * radius, 3.5), MNI_BOX)
    level = radius * (1 + noise) - distance + preference()
    allowed = _allowed(anatomy, rng, centre, territory)
    level = np.where(allowed, level, -np.inf).astype(np.float32)
    count = min(max(round(volume_ml / anatomy.grid.voxel_ml), 1), int(allowed.sum()))
    front = np.partition(level.ravel(), -count)[-count]
    seed = np.unravel_index(np.argmax(level), level.shape)
    parts = cc3d.connected_components(level >= front, connectivity=26)
    keep = ndimage.binary_closing(parts == parts[seed], iterations=1) & allowed
    level = level - np.nextafter(front, -np.inf)
    border = ndimage.binary_dilation(keep, iterations=2) & (level <= 0)  # islands elsewhere are not this lesion
    return np.where(keep, np.maximum(level, 1e-3), np.where(border, level, -np.inf)).astype(np.float32)


def _allowed(anatomy: Anatomy, rng: np.random.Generator, centre: np.ndarray, territory: Territory | None) -> np.ndarray:
    """Return where a lesion may grow: brain but no ventricle, the centre's hemisphere, the territory."""
    ventricle = (anatomy.fractions["csf"] > 0.4) & (anatomy.depth_mm < -12)
    allowed = anatomy.brain & (anatomy.depth_mm < -0.5) & ~ventricle
    side = np.sign(centre[0]) or 1.0
    allowed &= anatomy.template_mm[0] * side > 1.5
    if territory is not None:
        away = [_distance(anatomy, np.array(other.centre_mm) * (side, 1, 1)) for other in TERRITORIES]
        ragged_mm = 12.0 + 9.0 * random_field(rng, anatomy.grid.axes, 6.0, MNI_BOX)  # territories overlap, unevenly
        allowed &= away[TERRITORIES.index(territory)] <= np.min(away, axis=0) + np.clip(ragged_mm, 0, None)
    return allowed


def _distance(anatomy: Anatomy, point_mm: np.ndarray) -> np.ndarray:
    """Return the distance of every voxel to a point of MNI space, in mm."""
    return np.linalg.norm(anatomy.template_mm - point_mm.astype(np.float32)[:, None, None, None], axis=0)


def _soft(level: np.ndarray, anatomy: Anatomy, edge_mm: float = 0.0) -> np.ndarray:
    """Return the lesion's fraction of each voxel: 1 inside, 0 outside, partial at the border."""
    width = max(edge_mm, min(anatomy.grid.spacing))
    return np.clip(level / width + 0.5, 0, 1)
