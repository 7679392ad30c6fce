"""Segment images with a trained nnU-Net model, in this process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ssl.devices import default_device
from nnunet_ssl.errors import UserError

Image = Path | str
"""An image file."""


def segment(
    model_folder: Path | str,
    scans: Sequence[Image | Sequence[Image]],
    *,
    folds: Sequence[int | str] | None = None,
    device: torch.device | str | None = None,
) -> list[nibabel.Nifti1Image]:
    """Predict the label map of each case, on the grid of its first channel, as ``nnUNetv2_predict`` does.

    Args:
        model_folder: of any nnU-Net model, ``$nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION``.
        scans: for each case an image, or its images in the order of the model's channels.
        folds: to average; None for those that were trained to the end.
        device: where to predict; None for a GPU where PyTorch sees one.

    Raises:
        UserError: there is no finished model, or a case has not the model's channels.
    """
    model_folder = Path(model_folder)
    cases = [[scan] if isinstance(scan, Image) else list(scan) for scan in scans]
    _check(model_folder, cases)
    finished = sorted(
        path.parent.name.removeprefix("fold_") for path in model_folder.glob("fold_*/checkpoint_final.pth")
    )
    if not (finished and set(map(str, folds or finished)) <= set(finished)):
        raise UserError(f"{model_folder} has the finished folds {', '.join(finished) or 'none'}, not {folds or 'one'}.")
    device = torch.device(device or default_device())
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), folds or finished)
    with tempfile.TemporaryDirectory(prefix="nnunet_ssl_") as folder:
        names = [str(Path(folder, f"case_{number}")) for number in range(len(cases))]
        # The sequential way starts no processes: these would run the caller's script or notebook again.
        predictor.predict_from_files_sequential([list(map(str, case)) for case in cases], names)
        return [_in_memory(Path(f"{name}.nii.gz")) for name in names]


def _check(model_folder: Path, cases: Sequence[Sequence[Image]]) -> None:
    description = model_folder / "dataset.json"
    if not description.is_file():
        raise UserError(f"{model_folder} is no folder of an nnU-Net model: it has no dataset.json.")
    dataset = json.loads(description.read_text())
    if dataset["file_ending"] != ".nii.gz":
        raise UserError(f"The model writes {dataset['file_ending']} files: use nnUNetv2_predict.")
    channels = list(dataset["channel_names"].values())
    for case in cases:
        if len(case) != len(channels):
            raise UserError(
                f"The model wants {len(channels)} channels ({', '.join(channels)}), and the case of {case[:1]} has "
                f"{len(case)}."
            )
        if missing := [str(image) for image in case if not Path(image).is_file()]:
            raise UserError(f"There is no image {', '.join(missing)}.")


def _in_memory(path: Path) -> nibabel.Nifti1Image:
    """Read a label map whose file is about to go."""
    image = nibabel.Nifti1Image.from_filename(path)
    return nibabel.Nifti1Image(image.dataobj[...], image.affine, image.header)
