"""The conversion's report: a table, the list of what was left out, and contact sheets with mask outlines."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from nnunet_ssl.conversion.discovery import Skipped
from nnunet_ssl.files import written_beside
from nnunet_ssl.imaging.geometry import Volume

logger = logging.getLogger(__name__)

_TILE_PIXELS = 200
_SHEET_PANELS = 48
_OUTLINE = (1.0, 0.25, 0.2)


def write_report(
    rows: Sequence[dict[str, Any]], skipped: Sequence[Skipped], folder: Path, channels: Sequence[str], changed: bool
) -> None:
    """Write ``report.tsv``, ``skipped.tsv`` and, when a case changed, the contact sheets ``contact_sheet_01.png`` ...

    Args:
        rows: one per converted case, with at least `case` and `notes`.
        skipped: what was left out.
        folder: where to write; the cases' tiles lie in its folder ``tiles``.
        channels: whose pictures a tile holds, side by side.
        changed: whether any case was converted or removed since the sheets were made.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if name not in ("notes", "sources")] + ["notes", "sources"]
    _write_table(folder / "report.tsv", columns, rows)
    _write_table(folder / "skipped.tsv", ["what", "reason"], [vars(item) for item in skipped])
    sheets = sorted(folder.glob("contact_sheet_*.png"))
    if changed or not sheets:
        for sheet in sheets:
            sheet.unlink()
        per_sheet = _SHEET_PANELS // len(channels)
        for number, start in enumerate(range(0, len(rows), per_sheet), start=1):
            sheet = folder / f"contact_sheet_{number:02d}.png"
            _write_sheet(sheet, rows[start : start + per_sheet], folder / "tiles", channels)


def log_skipped(skipped: Sequence[Skipped], folder: Path | None) -> None:
    """Tell what was left out, by reason, with the first names."""
    for reason, number in Counter(item.reason for item in skipped).items():
        names = [item.what for item in skipped if item.reason == reason]
        more = f" and {number - len(names[:3])} more" if number > 3 else ""
        logger.info("Skipped (%s): %s%s", reason, ", ".join(names[:3]), more)
    if skipped and folder is not None:
        logger.info("The whole list is in %s", folder / "skipped.tsv")


def log_notes(rows: Sequence[dict[str, Any]]) -> None:
    """Tell what is remarkable about converted cases."""
    for row in rows:
        if row["notes"]:
            logger.info("Note on %s: %s", row["case"], row["notes"])


def write_text(path: Path, text: str) -> None:
    """Write a text file unless it holds just that already."""
    if not path.is_file() or path.read_text() != text:
        with written_beside(path) as partial:
            partial.write_text(text)


def write_tile(path: Path, channels: Sequence[Volume], label: np.ndarray | None) -> None:
    """Draw the axial slice with most lesion (or the middle of the head) of every channel, the label outlined.

    Left on the picture is left in the patient (RAS), up is anterior; the field of view is cut to the head.
    """
    from matplotlib.image import imsave

    first = channels[0]
    to_ras = nib.io_orientation(first.affine)
    mask = None if label is None else nib.apply_orientation(label, to_ras)
    images = [nib.apply_orientation(channel.array, to_ras) for channel in channels]
    spacing = nib.affines.voxel_sizes(first.affine @ nib.orientations.inv_ornt_aff(to_ras, first.array.shape))
    scan = next((image for image in images if image.any()), images[0])  # those before it may be placeholders
    weight = (mask if mask is not None and mask.any() else scan > scan.mean()).sum(axis=(0, 1))
    z = int(np.argmax(weight))
    head = _head(scan)
    panels = [
        _panel(image[head][:, :, z], None if mask is None else mask[head][:, :, z], spacing[:2]) for image in images
    ]
    with written_beside(path) as partial:
        imsave(partial, np.concatenate(panels, axis=1))


def _head(image: np.ndarray) -> tuple[slice, slice]:
    """Return the box around what is not background, in the first two axes, with a small margin."""
    tissue = image > 0.15 * np.percentile(image, 99)
    return _extent(tissue.any(axis=(1, 2))), _extent(tissue.any(axis=(0, 2)))


def _extent(inside: np.ndarray) -> slice:
    places = np.flatnonzero(inside)
    low, high = (int(places[0]), int(places[-1])) if places.size else (0, len(inside))
    return slice(max(low - 3, 0), high + 4)


def _panel(image: np.ndarray, mask: np.ndarray | None, spacing: np.ndarray) -> np.ndarray:
    """Return one slice as an RGB picture with square pixels, (`_TILE_PIXELS`, `_TILE_PIXELS`, 3) in 0 ... 1."""
    zoom = spacing * _TILE_PIXELS / (spacing * image.shape).max()
    low, high = np.percentile(image, [0.5, 99.7])
    grey = np.clip((ndimage.zoom(image, zoom, order=1) - low) / max(high - low, 1e-6), 0, 1)
    picture = np.repeat(grey[..., None], 3, axis=2)
    if mask is not None:
        large = ndimage.zoom(mask.astype(np.float32), zoom, order=1) > 0.5
        picture[ndimage.binary_dilation(large) & ~large] = _OUTLINE
    canvas = np.zeros((_TILE_PIXELS, _TILE_PIXELS, 3))
    width, height = (min(size, _TILE_PIXELS) for size in picture.shape[:2])
    x, y = (_TILE_PIXELS - width) // 2, (_TILE_PIXELS - height) // 2
    canvas[x : x + width, y : y + height] = picture[:width, :height]
    return canvas.transpose(1, 0, 2)[::-1]


def _write_sheet(path: Path, rows: Sequence[dict[str, Any]], tiles: Path, channels: Sequence[str]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    pictures = [imread(tiles / f"{row['case']}.png") for row in rows]
    columns = max(1, 8 // len(channels))
    lines = -(-len(rows) // columns)
    height, width = (size / 100 for size in pictures[0].shape[:2])
    total = lines * (height + 0.45) + 0.5
    figure = Figure(figsize=(columns * width * 1.02, total), facecolor="black")
    for number, (row, picture) in enumerate(zip(rows, pictures), start=1):
        axes = figure.add_subplot(lines, columns, number)
        axes.imshow(picture)
        axes.axis("off")
        axes.set_title(_caption(row), fontsize=7, color="orange" if row["notes"] else "white")
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.85 / total, 0.02, 0.25)
    legend = f"{' | '.join(channels)}   red: lesion mask   orange: see the notes in report.tsv   left is left"
    figure.text(0.01, 1 - 0.25 / total, legend, color="white", fontsize=9, va="center")
    with written_beside(path) as partial:
        figure.savefig(partial, dpi=100, facecolor="black")


def _caption(row: dict[str, Any]) -> str:
    """Return a case's name, the volume of its lesions, and the start of its notes."""
    volume = f"{row['label_ml']:.1f} ml" if "label_ml" in row else "no label"
    notes = row["notes"] if len(row["notes"]) <= 36 else row["notes"][:35] + "…"
    return f"{row['case']}\n{volume}" + (f"   {notes}" if notes else "")


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter="\t", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
