"""From the images of a case to its mask and probability map on the first image's own grid, by nnU-Net's predictor."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ssl.conversion.preparations import PREPARATIONS, prepared_as
from nnunet_ssl.corpus.modalities import UNKNOWN, modality_of
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import calibration
from nnunet_ssl.evaluation.operating_point import FILE, OperatingPoint, load
from nnunet_ssl.evaluation.probabilities import TURNED_TO_RAS, lesion_channel, onto_image
from nnunet_ssl.imaging.geometry import Volume, canonical, onto_grid
from nnunet_ssl.nnunet_folders import channel_names

MODEL = "package.json"
ANY = "input"
"""In place of a modality: the image, whatever it is."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What a model says of a case, on the grid of its first image.

    Attributes:
        labels: uint8 (X, Y, Z).
        probabilities: float32 (X, Y, Z), how likely each voxel is foreground.
        highest: the highest probability anywhere, before an operating point removed anything.
        volume_interval_ml: within which the true volume lies with the probability `coverage`; None where the package
            has no calibration.
        coverage: of the interval.
    """

    labels: Volume
    probabilities: Volume
    highest: float
    volume_interval_ml: tuple[float, float] | None = None
    coverage: float | None = None

    @property
    def volume_ml(self) -> float:
        return float(np.count_nonzero(self.labels.array)) * self.labels.voxel_ml

    def describe_volume(self) -> str:
        if self.volume_interval_ml is None:
            return f"{self.volume_ml:.2f} ml"
        low, high = self.volume_interval_ml
        return f"{self.volume_ml:.2f} ml [{low:.2f}, {high:.2f}; {self.coverage:.0%}]"


class Segmenter:
    """The models of a package's folder of weights, ready for case after case.

    Attributes:
        channels: the name of each input channel, as dataset.json has it.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        described = json.loads((folder / MODEL).read_text())
        point = load(folder / FILE) if (folder / FILE).is_file() else None
        self.point: OperatingPoint | None = point
        calibrated = folder / calibration.FILE
        self.calibration = json.loads(calibrated.read_text()) if calibrated.is_file() else None
        self.turned: bool = described["turn_to_ras"]
        self.predictors = [
            _predictor(folder / name, folds, device, mirroring=point is None or point.mirroring)
            for name, folds in described["models"].items()
        ]
        dataset = self.predictors[0].dataset_json
        self.channels: list[str] = channel_names(dataset)
        self.prepared_as: str | None = dataset.get("prepared_as")

    def choose(self, images: Mapping[str, Any]) -> list[Any]:
        """Put what is known by modality (``t1``, ``flair``) into the order of the model's channels.

        T2* and SWI stand for each other, ``input`` for the only channel; what is left over is not used.

        Raises:
            UserError: a channel is missing.
        """
        by_name = {_short(name): image for name, image in images.items()}
        if list(images) == [ANY] and len(self.channels) == 1:
            return [images[ANY]]
        alike = {"t2s": "swi", "swi": "t2s"}
        chosen = []
        for channel in self.channels:
            name = _short(channel)
            name = name if name in by_name else alike.get(name, name)
            if name not in by_name:
                given = ", ".join(images) or "nothing"
                raise UserError(f"The model needs {', '.join(self.channels)}; {channel} is missing (given: {given}).")
            chosen.append(by_name[name])
        return chosen

    def segment(self, images: Sequence[Volume]) -> Segmentation:
        """Segment a case.

        Args:
            images: one a channel, in the model's order. Others are brought onto the first one's grid.

        Raises:
            UserError: the number of images is not that of the channels.
        """
        if len(images) != len(self.channels):
            needed = ", ".join(self.channels)
            raise UserError(f"The model needs {len(self.channels)} images ({needed}), not {len(images)}.")
        images = self._prepared(images)
        first = images[0]
        data, spacing = self._as_nnunet_reads(images)
        classes = self._classes(data, spacing) if data.any() else None
        if classes is None:  # nnU-Net finds nothing to crop to
            logger.warning("The image is zero everywhere: so is the result.")
            zeros = first.with_array(np.zeros(first.array.shape, np.float32))
            return self._result(zeros.with_array(zeros.array.astype(np.uint8)), zeros, 0.0)
        labels = self.predictors[0].label_manager
        foreground = classes.max(axis=0) if labels.has_regions else lesion_channel(classes)
        foreground = self._back(foreground.astype(np.float32), first)
        if self.point is None:
            segmented = self._back(np.asarray(labels.convert_probabilities_to_segmentation(classes)), first)
            segmented, shown = segmented.astype(np.uint8), foreground
        else:
            mask = self.point.segment(foreground, first.voxel_ml * 1000)
            segmented, shown = mask.astype(np.uint8), self.point.finish(foreground, mask)
        return self._result(first.with_array(segmented), first.with_array(shown), float(foreground.max()))

    @torch.no_grad()
    def embed(self, images: Sequence[Volume]) -> np.ndarray:
        """Return the deepest features of a case, float32 (D,), averaged over the patch at its centre.

        They are the first model's, by its first fold.
        """
        predictor = self.predictors[0]
        data, spacing = self._as_nnunet_reads(self._prepared(images))
        plans, configuration = predictor.plans_manager, predictor.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=False)
        read = (data, None, {"spacing": spacing}, plans, configuration, predictor.dataset_json)
        preprocessed, *_ = preprocessor.run_case_npy(*read)
        patch = _central_patch(preprocessed, configuration.patch_size)
        network = predictor.network.to(predictor.device).eval()
        network.load_state_dict(predictor.list_of_parameters[0])
        pyramid = network.encoder(torch.from_numpy(patch)[None].to(predictor.device))
        return pyramid[-1].flatten(2).mean(dim=2)[0].float().cpu().numpy()

    def calibrated(self, probabilities: np.ndarray) -> np.ndarray:
        """Return probabilities as they are worth, if the package knows that; their order is the same."""
        return (
            probabilities
            if self.calibration is None
            else calibration.cool(probabilities, self.calibration["temperature"])
        )

    def _result(self, labels: Volume, probabilities: Volume, highest: float) -> Segmentation:
        result = Segmentation(labels=labels, probabilities=probabilities, highest=highest)
        if self.calibration is None:
            return result
        known = self.calibration["volume"]
        interval = calibration.volume_interval(result.volume_ml, known["reach"])
        return replace(result, volume_interval_ml=interval, coverage=known["coverage_promised"])

    def _prepared(self, images: Sequence[Volume]) -> list[Volume]:
        """Do to the images what the conversion of the training data did to those, if it was one of this package's."""
        if self.prepared_as not in PREPARATIONS:  # nnssl_package warns of a user's own
            return list(images)
        by_channel = {_short(channel): image for channel, image in zip(self.channels, images, strict=True)}
        prepared, notes = prepared_as(self.prepared_as, by_channel)
        for sentence in notes:
            logger.info("%s", sentence)
        return [prepared[_short(channel)] for channel in self.channels]

    def _as_nnunet_reads(self, images: Sequence[Volume]) -> tuple[np.ndarray, list[float]]:
        """Return what nnU-Net's reader gives, (C, Z, Y, X), and the voxels' size in mm along Z, Y, X."""
        first, *others = images
        channels = [first, *(onto_grid(other, first) for other in others)]
        if self.turned:
            channels = [canonical(channel) for channel in channels]
        data = np.stack([channel.array.transpose(2, 1, 0) for channel in channels]).astype(np.float32)
        finite = np.isfinite(data)
        if not finite.all():
            logger.warning("%d NaN or infinite voxels are taken for 0.", np.count_nonzero(~finite))
            data[~finite] = 0
        return data, [float(size) for size in channels[0].spacing[::-1]]

    def _classes(self, data: np.ndarray, spacing: list[float]) -> np.ndarray:
        """Return the probabilities of the classes, averaged over the models as ``nnUNetv2_ensemble`` does."""
        total: np.ndarray | None = None
        for predictor in self.predictors:
            _, classes = predictor.predict_single_npy_array(data, {"spacing": spacing}, None, None, True)
            total = classes.astype(np.float32) if total is None else total + classes
        assert total is not None
        return total / len(self.predictors)

    def _back(self, values: np.ndarray, image: Volume) -> np.ndarray:
        return np.ascontiguousarray(onto_image(values, image.affine, turned=self.turned))


def reads_turned(plans: Mapping[str, Any], folder: Path) -> bool:
    """Tell whether a model's reader turns images to RAS: that of its plans, whatever dataset.json asked for.

    Raises:
        UserError: it does not read medical images in three dimensions.
    """
    reader = plans["image_reader_writer"]
    if reader not in TURNED_TO_RAS:
        raise UserError(f"{folder} reads images by {reader}; only {', '.join(TURNED_TO_RAS)} can be packaged.")
    return TURNED_TO_RAS[reader]


def _central_patch(data: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Cut the patch at the centre, (C, *size), from (C, X, Y, Z); zeros where the image is smaller."""
    padded = pad_nd_image(data, size, mode="constant", kwargs={"constant_values": 0})
    starts = [(length - wanted) // 2 for length, wanted in zip(padded.shape[1:], size)]
    box = tuple(slice(start, start + wanted) for start, wanted in zip(starts, size))
    return np.ascontiguousarray(padded[(slice(None), *box)])


def _short(name: str) -> str:
    """Return a contrast's name in the package's vocabulary, else as it is, in lower case."""
    known = modality_of(name)
    return name.lower() if known == UNKNOWN else known


def _predictor(folder: Path, folds: Sequence[int | str], device: torch.device, *, mirroring: bool) -> nnUNetPredictor:
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), "checkpoint_final.pth")
    return predictor
