"""From a probability map to a mask: the threshold, and which small lesions stay. Stock nnU-Net applies it, too.

``nnUNetv2_apply_postprocessing`` calls the functions of a model's ``postprocessing.pkl``, which it imports by name:
here :func:`postprocess`. It hands them a label map and nothing else, neither the size of its voxels, without which
there are no mm3, nor its probabilities, without which there is no other threshold than nnU-Net's 0.5. Its own function
that reads the label map has both at hand, so they are taken from there.
"""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.matching import Connectivity, components, peaks_of
from nnunet_ssl.evaluation.probabilities import belongs_to, read_lesion_channel
from nnunet_ssl.files import written_beside

ARGMAX = 0.5
"""nnU-Net's own threshold: of two classes, the likelier one."""

FILE = "operating_point.json"
ROUNDING = 1e-6
"""Relative; a lesion of just the minimum size stays, however its voxels' size was rounded."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """How a lesion's probability becomes a mask.

    Attributes:
        threshold: a voxel is lesion where its probability is above this.
        minimum_mm3: smaller lesions are removed ...
        saving_peak: ... unless their highest probability reaches this; None: all of them.
        mirroring: whether the probabilities are to be averaged over mirrored images (nnU-Net's default; without it,
            ``--disable_tta``).
        connectivity: 6, 18 or 26 neighbours make one lesion.
        constant_map_when_empty: whether a map of which nothing remains is to be written as zeros.
    """

    threshold: float = ARGMAX
    minimum_mm3: float = 0.0
    saving_peak: float | None = None
    mirroring: bool = True
    connectivity: Connectivity = 26
    constant_map_when_empty: bool = False

    @property
    def needs_map(self) -> bool:
        """Whether nnU-Net's label map alone does not tell the mask."""
        return self.threshold != ARGMAX or (self.minimum_mm3 > 0 and self.saving_peak is not None)

    def keep(self, voxels: np.ndarray, peaks: np.ndarray | None, voxel_mm3: float) -> np.ndarray:
        """Tell which lesions stay, (P,), by their sizes in voxels and, where one may save them, their peaks."""
        kept = voxels * voxel_mm3 >= self.minimum_mm3 * (1 - ROUNDING)
        return kept if self.saving_peak is None or peaks is None else kept | (peaks >= self.saving_peak)

    def segment(self, probabilities: np.ndarray, voxel_mm3: float) -> np.ndarray:
        """Return the mask, bool, of a map of any three axes."""
        return self.clean(probabilities > self.threshold, probabilities, voxel_mm3)

    def clean(self, mask: np.ndarray, probabilities: np.ndarray | None, voxel_mm3: float) -> np.ndarray:
        """Remove from a mask the lesions that do not stay."""
        if self.minimum_mm3 == 0 or not mask.any():
            return mask
        labels, voxels = components(mask, self.connectivity)
        peaks = None if probabilities is None else peaks_of(probabilities, labels, len(voxels))
        return np.concatenate([[False], self.keep(voxels, peaks, voxel_mm3)])[labels]

    def finish(self, probabilities: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the map that goes with a mask."""
        return np.zeros_like(probabilities) if self.constant_map_when_empty and not mask.any() else probabilities


def postprocess(segmentation: np.ndarray, *, label: int, **point: float | bool | None) -> np.ndarray:
    """Apply an operating point to a label map (Z, Y, X), called by ``nnUNetv2_apply_postprocessing``.

    Args:
        segmentation: as nnU-Net's reader gives it.
        label: the lesion's; there is no other.
        point: the fields of an :class:`OperatingPoint`.

    Raises:
        UserError: the map that it needs does not lie beside the label map or is another's, or nnU-Net calls this in
            another way than 2.8 does.
    """
    chosen = OperatingPoint(**point)  # type: ignore[arg-type]
    file, spacing = _what_nnunet_reads()
    voxel_mm3 = float(np.prod(spacing))
    if not chosen.needs_map:
        mask = chosen.clean(segmentation == label, None, voxel_mm3)
    else:
        map_file = file.with_name(Path(file.name.removesuffix(".gz")).stem + ".npz")
        if not map_file.is_file():
            raise UserError(
                f"{file} has no {map_file.name} beside it, but this operating point needs probabilities: predict with "
                "--save_probabilities, and ensemble with --save_npz."
            )
        probabilities = read_lesion_channel(map_file)
        if probabilities.shape != segmentation.shape:
            raise UserError(
                f"{map_file} and {file} do not belong together: {probabilities.shape} voxels and "
                f"{segmentation.shape}. Predict both again."
            )
        if not belongs_to(probabilities, segmentation == label):
            raise UserError(
                f"{map_file} and {file} do not belong together: their lesions lie elsewhere. Predict both again."
            )
        mask = chosen.segment(probabilities, voxel_mm3)
    return np.where(mask, label, 0).astype(segmentation.dtype)


def _what_nnunet_reads() -> tuple[Path, list[float]]:
    """Return the label map's file and its voxels' size in mm, from the function of nnU-Net's that called."""
    for frame in _callers():
        if frame.f_code.co_name == "load_postprocess_save" and "props" in frame.f_locals:
            return Path(frame.f_locals["segmentation_file"]), frame.f_locals["props"]["spacing"]
    raise UserError(
        "This postprocessing is for nnUNetv2_apply_postprocessing of nnU-Net 2.8, which tells it the file and the "
        "size of its voxels; this is another version, or another caller."
    )


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def store(point: OperatingPoint, label: int, folder: Path, report: Mapping[str, Any]) -> None:
    """Write an operating point with a model: for nnU-Net's command, and readable with what was measured of it."""
    from nnunet_ssl.evaluation.results import write_json

    with written_beside(folder / "postprocessing.pkl") as temporary:
        temporary.write_bytes(pickle.dumps(([postprocess], [{"label": label, **asdict(point)}])))
    write_json({"point": asdict(point), **report}, folder / FILE)


def load(path: Path) -> OperatingPoint:
    """Read an operating point.

    Raises:
        UserError: it is none.
    """
    try:
        return OperatingPoint(**json.loads(path.read_text())["point"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what nnssl_operate writes ({error}): run it again.") from error
