"""Segment images with a trained nnU-Net model, in this process or as ``nnUNetv2_predict`` does; channels may be missing
where the model was trained for it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import nibabel
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ssl.architectures.channels import takes_any_channels
from nnunet_ssl.devices import default_device
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.interface.placeholders import Channels, PartialCase, completed, find_cases, partial_case

logger = logging.getLogger(__name__)

Image = Path | str
"""An image file."""

MISSING = "missing_channels.json"
"""In a folder of predictions: which channels the cases lacked."""


def segment(
    model_folder: Path | str,
    scans: Sequence[Image | Sequence[Image | None]],
    *,
    folds: Sequence[int | str] | None = None,
    device: torch.device | str | None = None,
) -> list[nibabel.Nifti1Image]:
    """Predict the label map of each case, on the grid of its first channel, as ``nnUNetv2_predict`` does.

    Args:
        model_folder: of any nnU-Net model, ``$nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION``.
        scans: for each case an image, or its images in the order of the model's channels, None for one that is missing.
        folds: to average; None for those that were trained to the end.
        device: where to predict; None for a GPU where PyTorch sees one.

    Raises:
        UserError: there is no finished model, or a case has not the model's channels.
    """
    model_folder = Path(model_folder)
    cases = [[scan] if isinstance(scan, Image) else list(scan) for scan in scans]
    channels = channels_of_model(model_folder)
    if channels.file_ending != ".nii.gz":
        raise UserError(f"The model writes {channels.file_ending} files: use nnUNetv2_predict.")
    _check(channels, cases)
    predictor = load_predictor(model_folder, folds, torch.device(device or default_device()))
    with tempfile.TemporaryDirectory(prefix="nnunet_ssl_") as folder:
        names = [f"case_{number}" for number in range(len(cases))]
        partial = [
            partial_case(name, [Path(file) if file else None for file in case], channels)
            if None in case
            else PartialCase(name, tuple(Path(file) for file in case if file))
            for name, case in zip(names, cases)
        ]
        refuse_missing(predictor, partial, channels)
        files = [completed(case, Path(folder), channels) for case in partial]
        # The sequential way starts no processes: these would run the caller's script or notebook again.
        predictor.predict_from_files_sequential(
            [list(map(str, one)) for one in files], [str(Path(folder, f"{name}_label")) for name in names]
        )
        return [_in_memory(Path(folder, f"{name}_label.nii.gz")) for name in names]


def predict(
    model_folder: Path,
    images: Path,
    output: Path,
    *,
    folds: Sequence[int | str] | None,
    checkpoint: str,
    device: torch.device,
    processes: tuple[int, int],
    save_probabilities: bool,
    overwrite: bool,
    **options: Any,
) -> dict[str, list[str]]:
    """Do what ``nnUNetv2_predict`` does for a folder of cases, some of whose files are missing.

    Args:
        model_folder: of an nnU-Net model.
        images: ``CASE_0000.nii.gz`` and so on.
        output: gets what ``nnUNetv2_predict`` writes, and :data:`MISSING`.
        folds: to average; None for those that are there.
        checkpoint: name of the folds' file.
        device: where to predict.
        processes: for preprocessing and for export; both 0: none but this one.
        save_probabilities: write them as well.
        overwrite: predict cases again that are there.
        options: of nnU-Net's predictor.

    Returns:
        for each case the names of the channels that it lacked.

    Raises:
        UserError: there is no such model, a case has no channel, cases lack channels and the model wants all, or
            there are processes for half of the work.
    """
    check_processes(*processes)
    channels = channels_of_model(model_folder)
    cases = find_cases(images, channels)
    predictor = load_predictor(model_folder, folds, device, checkpoint, **options)
    refuse_missing(predictor, cases, channels)
    missing = {case.id: case.missing(channels) for case in cases}
    for name, lacking in missing.items():
        logger.info("%s: %s", name, f"without {', '.join(lacking)}" if lacking else "all channels")
    output.mkdir(parents=True, exist_ok=True)
    with written_beside(output / MISSING) as temporary:
        temporary.write_text(json.dumps(missing, indent=1))
    predict_cases(predictor, cases, channels, output, processes, save_probabilities, overwrite)
    return missing


def predict_cases(
    predictor: nnUNetPredictor,
    cases: Sequence[PartialCase],
    channels: Channels,
    output: Path,
    processes: tuple[int, int] = (0, 0),
    save_probabilities: bool = False,
    overwrite: bool = True,
) -> None:
    """Write nnU-Net's predictions of cases, with placeholders for what they lack; see :func:`predict`."""
    with tempfile.TemporaryDirectory(prefix="nnunet_ssl_") as folder:
        files = [list(map(str, completed(case, Path(folder), channels))) for case in cases]
        common = {"save_probabilities": save_probabilities, "overwrite": overwrite}
        if processes == (0, 0):
            predictor.predict_from_files_sequential(files, str(output), **common)
            return
        preprocessing, export = processes
        predictor.predict_from_files(
            files,
            str(output),
            num_processes_preprocessing=preprocessing,
            num_processes_segmentation_export=export,
            **common,
        )


def channels_of_model(model_folder: Path) -> Channels:
    """Return what a model's images are.

    Raises:
        UserError: it is no folder of a model.
    """
    description = model_folder / "dataset.json"
    if not description.is_file():
        raise UserError(f"{model_folder} is no folder of an nnU-Net model: it has no dataset.json.")
    return Channels.of(json.loads(description.read_text()))


def load_predictor(
    model_folder: Path,
    folds: Sequence[int | str] | None,
    device: torch.device,
    checkpoint: str = "checkpoint_final.pth",
    **options: Any,
) -> nnUNetPredictor:
    """Return nnU-Net's predictor with the weights of folds, by default of those that are finished.

    Raises:
        UserError: a fold is not finished, or none is.
    """
    finished = finished_folds(model_folder, checkpoint)
    if not (finished and set(map(str, folds or finished)) <= set(finished)):
        raise UserError(f"{model_folder} has the finished folds {', '.join(finished) or 'none'}, not {folds or 'one'}.")
    options = {"perform_everything_on_device": device.type == "cuda", "allow_tqdm": False} | options
    predictor = nnUNetPredictor(device=device, **options)
    backend = matplotlib.get_backend()
    try:
        predictor.initialize_from_trained_model_folder(str(model_folder), folds or default_folds(finished), checkpoint)
    finally:
        matplotlib.use(backend)  # nnU-Net's trainers switch to files, and a notebook would show no figure any more
    return predictor


def finished_folds(model_folder: Path, checkpoint: str) -> list[str]:
    """The folds of a model that have such a file: ``["0", "1", "all"]``."""
    return sorted(path.parent.name.removeprefix("fold_") for path in model_folder.glob(f"fold_*/{checkpoint}"))


def default_folds(finished: Sequence[str]) -> list[str]:
    """Those of the finished folds that are averaged where none is named, as in nnU-Net: not the one of all cases."""
    return [fold for fold in finished if fold != "all"] or list(finished)


def check_processes(preprocessing: int, export: int) -> None:
    """See that there are processes for both, or for none of them.

    Raises:
        UserError: there are not.
    """
    if (preprocessing, export) != (0, 0) and min(preprocessing, export) < 1:
        raise UserError(
            f"{preprocessing} processes for preprocessing (-npp) and {export} for export (-nps): give each at least "
            "one, or both 0 for none but this one."
        )


def refuse_missing(predictor: nnUNetPredictor, cases: Sequence[PartialCase], channels: Channels) -> None:
    """See that a model can do without what its cases lack.

    Raises:
        UserError: it cannot; names the first case.
    """
    incomplete = [case for case in cases if None in case.files]
    if incomplete and not takes_any_channels(predictor.configuration_manager.configuration["architecture"]):
        first = incomplete[0]
        raise UserError(
            f"{len(incomplete)} of {len(cases)} cases lack channels (such as {first.id}: "
            f"{', '.join(first.missing(channels))}), and the model was trained with all of them: train one with "
            "nnssl_settings=channels=any."
        )


def _check(channels: Channels, cases: Sequence[Sequence[Image | None]]) -> None:
    for case in cases:
        if len(case) != len(channels.names):
            raise UserError(
                f"The model wants {len(channels.names)} channels ({', '.join(channels.names)}), and the case of "
                f"{case[:1]} has {len(case)}."
            )
        if missing := [str(image) for image in case if image and not Path(image).is_file()]:
            raise UserError(f"There is no image {', '.join(missing)}.")


def _in_memory(path: Path) -> nibabel.Nifti1Image:
    """Read a label map whose file is about to go."""
    image = nibabel.Nifti1Image.from_filename(path)
    return nibabel.Nifti1Image(image.dataobj[...], image.affine, image.header)
