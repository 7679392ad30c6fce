"""The console command ``nnssl_operate``: choose how a model's probabilities become masks."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nnunet_ssl.console import OptionParser, command, positive

logger = logging.getLogger(__name__)

EXAMPLE = """\
examples:
  nnssl_operate $nnUNet_results/Dataset504_ATLASv3/nnUNetTrainerMCLMIM__nnUNetPlans__3d_fullres --by centre -np 8
  nnssl_operate MODEL --preset atlas --metric dice --mirroring
  nnssl_operate MODEL_A MODEL_B -o operated

The folds' probabilities are needed: nnUNetv2_train ... --npz, or --val --npz afterwards.
"""


@command
def operate() -> None:
    parser = OptionParser(
        prog="nnssl_operate",
        description="Choose threshold and minimum lesion size by the cases that the folds held out, measure what that "
        "gains, and store it for nnUNetv2_apply_postprocessing. docs/how-to/isles26.md shows the way.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="folder of a trained model; several are averaged"
    )
    parser.add_argument(
        "-ref", type=Path, metavar="FOLDER", help="reference masks (default: gt_segmentations of the model's data set)"
    )
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write the choice here (default: the folder of the only model)"
    )
    parser.add_argument(
        "--preset", choices=("isles", "isles26", "atlas", "fcd"), default="isles26", help="(default: isles26)"
    )
    parser.add_argument("--metric", metavar="NAME", help="choose by its mean (default: by the preset's ranking)")
    parser.add_argument(
        "--by",
        default="subject",
        metavar="UNIT",
        help="what is held out whole: subject, centre, or a column of the conversion's report (default: subject)",
    )
    parser.add_argument(
        "--mirroring",
        action="store_true",
        help="choose between with and without, too; predicts the held-out cases without where they are not yet",
    )
    parser.add_argument("-device", default="cuda", help="for --mirroring (default: cuda)")
    parser.add_argument("-np", type=positive, default=1, metavar="N", help="processes (default: 1)")
    _operate(parser.parse_args())


def _operate(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation import operating, operating_point, out_of_fold
    from nnunet_ssl.evaluation.lesions import PRESETS

    models = arguments.models
    folder = out_of_fold.folder_of_choice(models, arguments.o)
    label = out_of_fold.only_label(models)
    metrics = (arguments.metric,) if arguments.metric else PRESETS[arguments.preset].official
    goal = operating.Goal(preset=arguments.preset, metrics=metrics)
    reference = arguments.ref or out_of_fold.reference_of(models[0])
    report = out_of_fold.report_of(models[0])
    folders = {True: out_of_fold.VALIDATION}
    if arguments.mirroring:
        from nnunet_ssl.devices import find_device
        from nnunet_ssl.evaluation.unmirrored import predict_unmirrored

        for model in models:
            predict_unmirrored(model, find_device(arguments.device))
        folders[False] = out_of_fold.UNMIRRORED
    held_out = {
        mirrored: out_of_fold.find_held_out(models, reference, by=arguments.by, report=report, where=where)
        for mirrored, where in folders.items()
    }
    points = operating.candidates(arguments.preset, tuple(folders))
    scores = operating.score_cases(held_out, points, goal, arguments.np)
    choice = operating.choose(scores, points, [case.unit for case in held_out[True]], goal)
    logger.info("%s", operating.describe(choice))
    operating_point.store(choice.point, label, folder, choice.report | {"models": models, "by": arguments.by})
    logger.info("written to %s. Next:", folder)
    mirroring = "" if choice.point.mirroring else " --disable_tta"
    probabilities = " --save_probabilities" if choice.point.needs_map else ""
    logger.info("  nnUNetv2_predict ...%s%s", mirroring, probabilities)
    logger.info(
        "  nnUNetv2_apply_postprocessing -i PREDICTED -o MASKS -pp_pkl_file %s -plans_json %s",
        folder / "postprocessing.pkl",
        models[0] / "plans.json",
    )
