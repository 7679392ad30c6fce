"""What ``nnssl_evaluate`` measures of segmentations: lesions, ranking, missing, calibration."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path

from nnunet_ssl.console import Subcommands, add_subcommand, positive
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.commands.common import add_json, share, show

logger = logging.getLogger(__name__)


def add_lesions(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "lesions",
        _lesions,
        "How well predicted lesion masks agree with their references.",
        """\
examples:
  nnssl_evaluate lesions -ref $nnUNet_raw/Dataset502_ISLES2022/labelsTs -pred predictions --preset isles
  nnssl_evaluate lesions -ref labelsTr -pred fold_0/validation --chill -np 8 -o lesions_fold_0 --json
  nnssl_evaluate lesions -ref labelsTr -pred fold_0/validation --chill --preset isles26
""",
    )
    parser.add_argument("-ref", type=Path, required=True, metavar="FOLDER", help="reference masks, CASE.nii.gz")
    parser.add_argument("-pred", type=Path, required=True, metavar="FOLDER", help="predicted masks of the same names")
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write lesions.json, .tsv and .png here (default: FOLDER of -pred)"
    )
    _add_preset(parser)
    parser.add_argument(
        "-prob",
        type=Path,
        metavar="FOLDER",
        help="probability maps for the PR-AUC, CASE.npz of nnU-Net or CASE.nii.gz (isles26: the first, in -pred)",
    )
    parser.add_argument("--connectivity", type=int, choices=(6, 18, 26), help="neighbours that make one lesion")
    parser.add_argument("-l", "--label", type=int, metavar="N", help="the lesion's label (default: all above 0)")
    parser.add_argument("--tolerance", type=float, default=1.0, metavar="MM", help="of the surface Dice (default: 1)")
    parser.add_argument("--chill", action="store_true", help="compare only the cases that were predicted")
    parser.add_argument("-np", type=positive, default=1, metavar="N", help="processes (default: 1)")
    add_json(parser)


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", choices=("isles", "isles26", "atlas", "fcd"), default="isles", help="(default: isles)"
    )


def _lesions(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.figures.lesions import draw_lesions
    from nnunet_ssl.evaluation.results import write_json, write_tsv
    from nnunet_ssl.evaluation.segmentations import LesionConfig, compare_folders, describe_lesions, summarize_cases

    config = LesionConfig(
        preset=arguments.preset,
        connectivity=arguments.connectivity,
        label=arguments.label,
        tolerance_mm=arguments.tolerance,
    )
    cases = compare_folders(
        arguments.ref, arguments.pred, config, maps=arguments.prob, subset=arguments.chill, processes=arguments.np
    )
    summary = summarize_cases(cases, config)
    result = summary | {"cases": cases.to_dict("records")}
    show(result, describe_lesions(summary), arguments)
    folder = arguments.o or arguments.pred  # where nnU-Net, too, writes what it finds
    write_json(result, folder / "lesions.json")
    write_tsv(cases, folder / "lesions.tsv")
    draw_lesions(cases, summary, folder / "lesions.png", title="/".join(arguments.pred.absolute().parts[-3:]))
    logger.info("written to %s", folder)


def add_ranking(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "ranking",
        _ranking,
        "Which of several predictions a challenge would put first: ranks per case and metric, averaged.",
        """\
examples:
  nnssl_evaluate ranking lesions_resenc lesions_swin lesions_ensemble
  nnssl_evaluate ranking fold_0/validation other/fold_0/validation --metrics dice lesion_f1 -o ranking
""",
    )
    parser.add_argument(
        "predictions", type=Path, nargs="+", metavar="FOLDER", help="with the lesions.json of nnssl_evaluate lesions"
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="as in lesions.json (default: the preset's official)"
    )
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="write ranking.json here")
    add_json(parser)


def _ranking(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.ranking import describe_ranking, official_metrics, rank, read_predictions
    from nnunet_ssl.evaluation.results import write_json

    tables, preset = read_predictions(arguments.predictions)
    result = {"preset": preset, **rank(tables, official_metrics(preset, arguments.metrics))}
    show(result, describe_ranking(result), arguments)
    if arguments.o:
        write_json(result, arguments.o / "ranking.json")
        logger.info("written to %s", arguments.o)


def add_missing(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "missing",
        _missing,
        "What models lose when channels are missing: every subset of the channels, beside its specialist.",
        """\
examples:
  nnssl_evaluate missing -i imagesTs -ref labelsTs -m MCL+MIM=MODEL scratch=MODEL -o missing
  nnssl_evaluate missing -i imagesTs -ref labelsTs -m pooled=SEED_0 pooled=SEED_1 --specialists MODEL MODEL -o missing
""",
    )
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images, CASE_0000.nii.gz, ...")
    parser.add_argument("-ref", type=Path, required=True, metavar="FOLDER", help="reference masks, CASE.nii.gz")
    parser.add_argument(
        "-m",
        nargs="+",
        required=True,
        metavar="ARM=FOLDER",
        help="models of channels=any; those of one arm, such as seeds, are averaged",
    )
    parser.add_argument(
        "--specialists", type=Path, nargs="+", default=[], metavar="FOLDER", help="models of some of the channels"
    )
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to average (default: those that are finished)")
    _add_preset(parser)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="predictions, missing.json, .tsv, .png")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring")
    parser.add_argument("-npp", type=int, default=0, metavar="N", help="processes for preprocessing (default: 0)")
    parser.add_argument("-nps", type=int, default=0, metavar="N", help="processes for export (default: 0)")
    parser.add_argument("-device", default="cuda", help="cuda, cuda:1, cpu, mps (default: cuda)")
    add_json(parser)


def _missing(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.devices import find_device
    from nnunet_ssl.evaluation.figures.missing import draw_missing
    from nnunet_ssl.evaluation.missing import (
        SPECIALIST,
        Model,
        describe_missing,
        measure_missing,
        predict_subsets,
        summarize_missing,
    )
    from nnunet_ssl.evaluation.results import write_json, write_tsv
    from nnunet_ssl.evaluation.segmentations import LesionConfig

    named = [text.partition("=") for text in arguments.m]
    if wrong := [arm for arm, _, folder in named if not folder or arm in ("", SPECIALIST) or "/" in arm]:
        raise UserError(f"-m {wrong[0]}: name each model ARM=FOLDER, with an arm other than '{SPECIALIST}'.")
    if not arguments.ref.is_dir():
        raise UserError(f"There is no folder {arguments.ref}.")  # which predicting would only tell at its end
    config = LesionConfig(preset=arguments.preset)
    predictions = predict_subsets(
        [Model(arm, Path(folder)) for arm, _, folder in named],
        arguments.specialists,
        arguments.i,
        arguments.o / "predictions",
        device=find_device(arguments.device),
        folds=arguments.f,
        processes=(arguments.npp, arguments.nps),
        use_mirroring=not arguments.disable_tta,
    )
    cases = measure_missing(predictions, arguments.ref, config)
    result = summarize_missing(cases, config)
    show(result, describe_missing(result), arguments)
    write_json(result, arguments.o / "missing.json")
    write_tsv(cases, arguments.o / "missing.tsv")
    draw_missing(result, arguments.o / "missing.png")
    logger.info("written to %s", arguments.o)


def add_calibration(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "calibration",
        _calibration,
        "What a model's probabilities and volumes are worth, by the cases that its folds held out.",
        """\
example:
  nnssl_evaluate calibration $nnUNet_results/Dataset504_ATLASv3/nnUNetTrainerMCLMIM__nnUNetPlans__3d_fullres -np 8
""",
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folder of a model; several are averaged")
    parser.add_argument(
        "-ref", type=Path, metavar="FOLDER", help="reference masks (default: gt_segmentations of the model's data set)"
    )
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write calibration.json and .png here (default: the only model's)"
    )
    parser.add_argument(
        "--by", default="subject", metavar="UNIT", help="what is held out whole, as in nnssl_operate (subject)"
    )
    parser.add_argument(
        "--coverage", type=share, default=0.9, metavar="SHARE", help="of the volumes' intervals (default: 0.9)"
    )
    parser.add_argument("-np", type=positive, default=1, metavar="N", help="processes (default: 1)")
    add_json(parser)


def _calibration(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation import operating_point, out_of_fold
    from nnunet_ssl.evaluation.calibration import FILE, calibrate, count_cases, describe
    from nnunet_ssl.evaluation.figures.calibration import draw_calibration
    from nnunet_ssl.evaluation.results import write_json

    models = arguments.models
    folder = out_of_fold.folder_of_choice(models, arguments.o)
    out_of_fold.only_label(models)
    chosen = folder / operating_point.FILE
    point = operating_point.load(chosen) if chosen.is_file() else operating_point.OperatingPoint()
    held_out = out_of_fold.find_held_out(
        models,
        arguments.ref or out_of_fold.reference_of(models[0]),
        by=arguments.by,
        report=out_of_fold.report_of(models[0]),
        where=out_of_fold.VALIDATION if point.mirroring else out_of_fold.UNMIRRORED,
    )
    counts = count_cases(held_out, point, arguments.np)
    result = calibrate(counts, [case.unit for case in held_out], arguments.coverage)
    show(result, describe(result), arguments)
    write_json(result | {"point": asdict(point)}, folder / FILE)
    draw_calibration(counts, result, folder / "calibration.png", title=" + ".join(model.name for model in models))
    logger.info("written to %s", folder)
