"""Draw the synthetic brains that the README shows: ``python docs/figures/make_phantom_figure.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image

from nnunet_ssl.evaluation.figures.style import figure, without_scales
from nnunet_ssl.phantom.acquisition import acquire, draw_quality
from nnunet_ssl.phantom.anatomy import Anatomy, build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.lesions import acute_stroke, chronic_stroke, focal_dysplasia, white_matter_hyperintensities

FOLDER = Path(__file__).parent
VOXEL_MM = 1.5
OUTLINE = "#E69F00"
MODALITIES = ("t1", "t2", "flair", "dwi", "adc", "t1c")

Lesion = Callable[[Anatomy, np.random.Generator, float], tuple[Anatomy, np.ndarray]]
SUBJECTS: dict[str, tuple[int, Lesion | None, float]] = {  # name: seed, lesion, ml
    "no stroke": (3, None, 0.0),
    "acute stroke": (131, acute_stroke, 30.0),
    "chronic stroke": (12, chronic_stroke, 45.0),
}
DATA_SETS: dict[str, tuple[str, Lesion, tuple[tuple[int, float], ...]]] = {  # name: modality, lesion, (seed, ml) ...
    "ATLAS, t1": ("t1", chronic_stroke, ((101, 40.0), (113, 8.0), (110, 15.0))),
    "ISLES, dwi": ("dwi", acute_stroke, ((122, 15.0), (121, 25.0), (120, 10.0))),
    "FCD, flair": ("flair", focal_dysplasia, ((130, 6.0), (131, 6.0), (133, 4.0))),
}


def subject(seed: int, lesion: Lesion | None, volume_ml: float) -> tuple[Anatomy, np.ndarray, np.random.Generator]:
    """Build a head and the mask of its lesion; the generator returned draws its scans."""
    rng = np.random.default_rng(seed)
    person = draw_person(rng)
    anatomy = white_matter_hyperintensities(build_anatomy(person, mni_grid(VOXEL_MM)), rng, person.atrophy)
    if lesion is None:
        return anatomy, np.zeros(anatomy.grid.shape, bool), rng
    return *lesion(anatomy, rng, volume_ml), rng


def show(axes: Axes, image: np.ndarray, mask: np.ndarray, *, white: float, outline: bool) -> None:
    """Draw the axial slice with most of the lesion (or the middle one), as radiologists see it: right is left."""
    level = int(mask.sum(axis=(0, 1)).argmax()) if mask.any() else image.shape[2] // 2
    rows = slice(round(0.03 * image.shape[1]), round(0.97 * image.shape[1]))
    axes.imshow(image[::-1, rows, level].T[::-1], cmap="gray", vmin=0, vmax=white, interpolation="bilinear")
    if outline and mask.any():
        axes.contour(mask[::-1, rows, level].T[::-1], [0.5], colors=OUTLINE, linewidths=0.9)
    without_scales(axes)


def scan(anatomy: Anatomy, modality: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Scan a head; return the image and the value to show as white."""
    image = acquire(anatomy, modality, draw_quality(rng), rng)
    return image, 3.2 if modality == "adc" else 1.1 * float(np.percentile(image[anatomy.brain], 99.7))


def draw_modalities(path: Path) -> None:
    """One row a subject, one column a modality; the last column outlines the lesion."""
    with figure(path, (7.2, 4.3)) as drawing:
        grid = drawing.subplots(len(SUBJECTS), len(MODALITIES))
        for row, (name, recipe) in zip(grid, SUBJECTS.items()):
            anatomy, mask, rng = subject(*recipe)
            for axes, modality in zip(row, MODALITIES):
                image, white = scan(anatomy, modality, rng)
                show(axes, image, mask, white=white, outline=modality == MODALITIES[-1])
            row[0].set_ylabel(name)
        for axes, modality in zip(grid[0], MODALITIES):
            axes.set_title(modality, loc="center")
    fewer_greys(path)


def draw_lesions(path: Path) -> None:
    """One row a data set; each subject's slice without and with the lesion's outline."""
    with figure(path, (7.2, 4.3)) as drawing:
        grid = drawing.subplots(len(DATA_SETS), 6)
        for row, (name, (modality, lesion, cases)) in zip(grid, DATA_SETS.items()):
            for number, (seed, volume_ml) in enumerate(cases):
                anatomy, mask, rng = subject(seed, lesion, volume_ml)
                image, white = scan(anatomy, modality, rng)
                for axes, outline in zip(row[2 * number :], (False, True)):
                    show(axes, image, mask, white=white, outline=outline)
                axes.set_title(f"{mask.sum() * anatomy.grid.voxel_ml:.0f} ml", loc="right")
            row[0].set_ylabel(name)
    fewer_greys(path)


def fewer_greys(path: Path) -> None:
    """Write a picture again with 48 greys and 16 shades of the outline: a third of the bytes, and no visible loss."""
    greys = np.append(np.linspace(0, 240, 47), 255)[:, None].repeat(3, axis=1)
    shades = [share * np.array(to_rgb(OUTLINE)) * 255 + (1 - share) * grey for share in (0.5, 1) for grey in greys[::6]]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([greys, shades]).astype(np.uint8).tobytes())
    with Image.open(path) as picture:
        reduced = picture.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


if __name__ == "__main__":
    draw_modalities(FOLDER / "phantom.png")
    draw_lesions(FOLDER / "phantom_lesions.png")
