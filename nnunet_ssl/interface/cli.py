"""The console commands of prediction with missing channels: ``nnssl_predict``, ``nnssl_placeholders``."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from nnunet_ssl.console import OptionParser, command
from nnunet_ssl.errors import UserError

logger = logging.getLogger(__name__)

_PREDICT = """\
Predict cases that lack some of their channels with a model that was trained with nnssl_settings=channels=any.

Options and output are those of nnUNetv2_predict. Every case is predicted from the files that are there; which those
are is said, and written into missing_channels.json beside the predictions.
"""

_PREDICT_EXAMPLE = """\
examples:
  nnssl_predict -i IN -o OUT -d 502 -c 3d_fullres -f 0 -tr nnUNetTrainerMCLMIM -p nnUNetPlans_channels-any
  nnssl_predict -i IN -o OUT -m $nnUNet_results/Dataset502_ISLES2022/TRAINER__PLANS__3d_fullres
"""

_PLACEHOLDERS = """\
Write a placeholder beside the images of each case for each channel that it lacks: an image of zeros, on their grid.

nnU-Net's own commands want a file for each channel. With these they predict by a model, or train one, that was told
nnssl_settings=channels=any.
"""

_PLACEHOLDERS_EXAMPLE = """\
examples:
  nnssl_placeholders -i IN -d 502
  nnssl_placeholders -i IN -m $nnUNet_results/Dataset502_ISLES2022/TRAINER__PLANS__3d_fullres
"""


@command
def predict() -> None:
    parser = OptionParser(prog="nnssl_predict", description=_PREDICT, epilog=_PREDICT_EXAMPLE)
    parser.add_argument("-i", type=Path, required=True, metavar="IN", help="folder of images, CASE_0000.nii.gz, ...")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder of predictions")
    which = parser.add_argument_group("the model: its folder, or its parts")
    which.add_argument("-m", type=Path, metavar="FOLDER", help="DATASET/TRAINER__PLANS__CONFIGURATION")
    which.add_argument("-d", metavar="DATASET", help="number or name")
    which.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="(default: nnUNetTrainer)")
    which.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="(default: nnUNetPlans)")
    which.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="(default: 3d_fullres)")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to average (default: those that are finished)")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="(default: checkpoint_final.pth)")
    parser.add_argument("-step_size", type=float, default=0.5, help="of the sliding window (default: 0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring")
    parser.add_argument("--save_probabilities", action="store_true", help="for ensembles of models")
    parser.add_argument("--continue_prediction", action="store_true", help="leave predictions that are there")
    parser.add_argument("--disable_progress_bar", action="store_true")
    parser.add_argument("--not_on_device", action="store_true", help="collect on the CPU, for large cases")
    parser.add_argument("-npp", type=int, default=3, metavar="N", help="processes for preprocessing (default: 3)")
    parser.add_argument(
        "-nps", type=int, default=3, metavar="N", help="processes for export (default: 3); 0, and -npp 0: one in all"
    )
    parser.add_argument("-device", default="cuda", help="cuda, cpu or mps (default: cuda)")
    arguments = parser.parse_args()
    if (arguments.m is None) == (arguments.d is None):
        raise UserError("Name the model by its folder (-m), or by data set (-d) with -tr, -p and -c.")

    from nnunet_ssl.devices import find_device
    from nnunet_ssl.interface import segmentation

    device = find_device(arguments.device)
    missing = segmentation.predict(
        arguments.m or _model_folder(arguments),
        arguments.i,
        arguments.o,
        folds=arguments.f,
        checkpoint=arguments.chk,
        device=device,
        processes=(arguments.npp, arguments.nps),
        save_probabilities=arguments.save_probabilities,
        overwrite=not arguments.continue_prediction,
        tile_step_size=arguments.step_size,
        use_mirroring=not arguments.disable_tta,
        perform_everything_on_device=device.type == "cuda" and not arguments.not_on_device,
        allow_tqdm=not arguments.disable_progress_bar,
    )
    logger.info(
        "%d cases in %s, %d of them from a part of the channels", len(missing), arguments.o, _incomplete(missing)
    )


@command
def placeholders() -> None:
    parser = OptionParser(prog="nnssl_placeholders", description=_PLACEHOLDERS, epilog=_PLACEHOLDERS_EXAMPLE)
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="of images, CASE_0000.nii.gz, ...")
    parser.add_argument("-d", metavar="DATASET", help="number or name, in nnUNet_raw")
    parser.add_argument("-m", type=Path, metavar="FOLDER", help="or of a model, DATASET/TRAINER__PLANS__CONFIGURATION")
    arguments = parser.parse_args()
    if (arguments.m is None) == (arguments.d is None):
        raise UserError("Say which channels a case has: by the data set (-d), or by the folder of a model (-m).")

    from nnunet_ssl.interface.placeholders import Channels, completed, find_cases
    from nnunet_ssl.nnunet_folders import dataset_folder

    folder = arguments.m or dataset_folder(arguments.d, "nnUNet_raw")
    if not (folder / "dataset.json").is_file():
        raise UserError(f"{folder} has no dataset.json, which says what channels a case has.")
    channels = Channels.of(json.loads((folder / "dataset.json").read_text()))
    cases = find_cases(arguments.i, channels)
    missing = {case.id: case.missing(channels) for case in cases}
    for case in cases:
        if missing[case.id]:
            completed(case, arguments.i, channels)
            logger.info("%s: placeholders for %s", case.id, ", ".join(missing[case.id]))
    logger.info("%d cases in %s, %d of them with placeholders", len(cases), arguments.i, _incomplete(missing))


def _incomplete(missing: dict[str, list[str]]) -> int:
    return sum(map(bool, missing.values()))


def _model_folder(arguments: argparse.Namespace) -> Path:
    from nnunetv2.utilities.file_path_utilities import convert_trainer_plans_config_to_identifier

    from nnunet_ssl.nnunet_folders import dataset_folder

    name = convert_trainer_plans_config_to_identifier(arguments.tr, arguments.p, arguments.c)
    return dataset_folder(arguments.d, "nnUNet_results") / name
