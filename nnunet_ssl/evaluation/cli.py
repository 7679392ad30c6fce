"""The command ``nnssl_evaluate``: alignment, lesions, ranking, missing, calibration, probe, finetune, gradients."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.console import OptionParser, Subcommands, add_subcommand, command, positive, seed
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.embeddings import Embeddings
    from nnunet_ssl.evaluation.scan_prediction import Prediction

logger = logging.getLogger(__name__)

_EXAMPLES = {
    "alignment": """\
examples:
  nnssl_evaluate alignment --checkpoint $nnUNet_results/Dataset500_FOMO60K/mcl_mim -d 500
  nnssl_evaluate alignment --embeddings mcl.npz --metadata mcl.csv -o alignment_mcl --json
""",
    "lesions": """\
examples:
  nnssl_evaluate lesions -ref $nnUNet_raw/Dataset501_ATLASv2/labelsTs -pred predictions --preset atlas
  nnssl_evaluate lesions -ref labelsTr -pred fold_0/validation --chill -np 8 -o lesions_fold_0 --json
  nnssl_evaluate lesions -ref labelsTr -pred fold_0/validation --chill --preset isles26
""",
    "ranking": """\
examples:
  nnssl_evaluate ranking lesions_resenc lesions_swin lesions_ensemble
  nnssl_evaluate ranking fold_0/validation other/fold_0/validation --metrics dice lesion_f1 -o ranking
""",
    "missing": """\
examples:
  nnssl_evaluate missing -i imagesTs -ref labelsTs -m MCL+MIM=MODEL scratch=MODEL -o missing
  nnssl_evaluate missing -i imagesTs -ref labelsTs -m pooled=SEED_0 pooled=SEED_1 --specialists MODEL MODEL -o missing
""",
    "calibration": """\
example:
  nnssl_evaluate calibration $nnUNet_results/Dataset504_ATLASv3/nnUNetTrainerMCLMIM__nnUNetPlans__3d_fullres -np 8
""",
    "probe": """\
examples:
  nnssl_evaluate probe --checkpoint $nnUNet_results/Dataset500_FOMO60K/mcl_mim -d 500 --target age -o probe_age
  nnssl_evaluate probe --embeddings mcl.npz --metadata mcl.csv --target sex --json
  nnssl_evaluate probe --checkpoint mcl_mim -d 500 --target age --across --modalities t1 flair -o probe_across
""",
    "finetune": """\
examples:
  nnssl_evaluate finetune --checkpoint $nnUNet_results/Dataset500_FOMO60K/mcl_mim -d 500 --target age -o finetune_age
  nnssl_evaluate finetune --checkpoint mcl_mim -d 500 --target group --across --modalities t1 flair --scratch -o scratch
""",
    "gradients": """\
example:
  cd $nnUNet_results/Dataset500_FOMO60K && nnssl_evaluate gradients mcl_mim cl_mim mcl_mim_balanced -o gradients
""",
}


@command
def evaluate() -> None:
    parser = OptionParser(
        prog="nnssl_evaluate",
        description="Measure a representation or a segmentation. docs/reference/scores.md defines every figure.",
    )
    commands = parser.add_subparsers(required=True, metavar=" | ".join(_EXAMPLES))
    _add_alignment(commands)
    _add_lesions(commands)
    _add_ranking(commands)
    _add_missing(commands)
    _add_calibration(commands)
    _add_probe(commands)
    _add_finetune(commands)
    _add_gradients(commands)
    arguments = parser.parse_args()
    if getattr(arguments, "json", None) == "-":
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    arguments.run(arguments)


def _subcommand(commands: Subcommands, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
    """Add the subcommand that has the name of the function it runs."""
    name = run.__name__.removeprefix("_")
    return add_subcommand(commands, name, run, help, _EXAMPLES[name])


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON to FILE, or to standard output"
    )


def _add_embedding_source(parser: argparse.ArgumentParser, max_subjects: int) -> None:
    stored = parser.add_argument_group("stored embeddings")
    stored.add_argument("--embeddings", type=Path, metavar="FILE.npz", help="one array (scans, dimensions)")
    stored.add_argument(
        "--metadata",
        type=Path,
        metavar="FILE.csv",
        help="columns filename, embedding_index, modality, patient_id, session_id",
    )
    fresh = parser.add_argument_group("or a checkpoint and a prepared corpus")
    _add_encoder_and_corpus(fresh, max_subjects)
    fresh.add_argument(
        "--view",
        choices=("centre", "tiles"),
        default="centre",
        help="one central patch, or patches over the whole brain",
    )
    fresh.add_argument("--patch_size", type=positive, nargs=3, metavar="N", help="voxels (default: the pre-training's)")
    fresh.add_argument(
        "--subjects", choices=("all", "validation"), default="all", help="validation: those the pre-training held out"
    )
    fresh.add_argument("--batch_size", type=positive, default=4, metavar="N", help="patches at a time (default: 4)")


def _add_encoder_and_corpus(parser: argparse._ActionsContainer, max_subjects: int, *, required: bool = False) -> None:
    """Add what says which encoder sees the scans of whom, and where."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=required,
        metavar="FILE",
        help="any checkpoint nnssl_weights reads, or a pre-training's folder",
    )
    parser.add_argument(
        "-d", metavar="DATASET", help="the corpus, prepared with nnssl_prepare (default: 500)", default="500"
    )
    parser.add_argument(
        "--max_subjects",
        type=positive,
        default=max_subjects,
        metavar="N",
        help=f"draw at most N (default: {max_subjects})",
    )
    parser.add_argument("-device", default="cuda", help="cuda, cuda:1, cpu, mps (default: cuda)")


def _embeddings(arguments: argparse.Namespace) -> tuple[Embeddings, str]:
    """Read the stored embeddings, or compute them; return them with a name for titles."""
    if bool(arguments.embeddings) != bool(arguments.metadata):
        raise UserError("--embeddings and --metadata belong together: the table says what each row of the array is.")
    if bool(arguments.embeddings) == bool(arguments.checkpoint):
        raise UserError("Give either --embeddings and --metadata, or --checkpoint and -d.")
    if arguments.embeddings:
        from nnunet_ssl.evaluation.embeddings import read_embeddings

        return read_embeddings(arguments.embeddings, arguments.metadata), arguments.embeddings.stem
    from nnunet_ssl.devices import find_device
    from nnunet_ssl.evaluation.encoding import EncodingConfig, embed_corpus

    config = EncodingConfig(
        view=arguments.view,
        patch_size=arguments.patch_size and tuple(arguments.patch_size),
        subjects=arguments.subjects,
        max_subjects=arguments.max_subjects,
        batch_size=arguments.batch_size,
    )
    device = find_device(arguments.device)
    return embed_corpus(arguments.checkpoint, arguments.d, config, device), _name_of(arguments.checkpoint)


def _name_of(checkpoint: Path) -> str:
    return checkpoint.name if checkpoint.is_dir() else f"{checkpoint.absolute().parent.name}/{checkpoint.name}"


def _show(result: dict[str, Any], text: str, arguments: argparse.Namespace) -> None:
    """Show the result as asked, lines for a person or JSON for a program; before files are written, which may fail."""
    from nnunet_ssl.evaluation.results import json_text, write_json

    if arguments.json == "-":
        sys.stdout.write(json_text(result))
    else:
        logger.info("%s", text)
        if arguments.json:
            write_json(result, Path(arguments.json))


def _add_alignment(commands: Subcommands) -> None:
    parser = _subcommand(
        commands, _alignment, "How close a subject's modalities lie in a representation, and subjects apart."
    )
    _add_embedding_source(parser, max_subjects=500)
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write alignment.json, alignment.png and new embeddings here"
    )
    parser.add_argument("--map", choices=("tsne", "pca"), default="tsne", help="2-D map of the figure (default: tsne)")
    _add_json(parser)


def _alignment(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.alignment import describe_alignment, measure_alignment

    embeddings, name = _embeddings(arguments)
    result = measure_alignment(embeddings)
    _show(result, describe_alignment(result), arguments)
    if arguments.o:
        from nnunet_ssl.evaluation.embeddings import write_embeddings
        from nnunet_ssl.evaluation.figures.alignment import draw_alignment
        from nnunet_ssl.evaluation.results import write_json

        write_json(result, arguments.o / "alignment.json")
        draw_alignment(embeddings, result, arguments.o / "alignment.png", projection=arguments.map, title=name)
        if arguments.checkpoint:
            write_embeddings(embeddings, arguments.o)
        logger.info("written to %s", arguments.o)


def _add_lesions(commands: Subcommands) -> None:
    parser = _subcommand(commands, _lesions, "How well predicted lesion masks agree with their references.")
    parser.add_argument("-ref", type=Path, required=True, metavar="FOLDER", help="reference masks, CASE.nii.gz")
    parser.add_argument("-pred", type=Path, required=True, metavar="FOLDER", help="predicted masks of the same names")
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write lesions.json, .tsv and .png here (default: FOLDER of -pred)"
    )
    parser.add_argument(
        "--preset", choices=("isles", "isles26", "atlas", "fcd"), default="isles", help="(default: isles)"
    )
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
    _add_json(parser)


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
    _show(result, describe_lesions(summary), arguments)
    folder = arguments.o or arguments.pred  # where nnU-Net, too, writes what it finds
    write_json(result, folder / "lesions.json")
    write_tsv(cases, folder / "lesions.tsv")
    draw_lesions(cases, summary, folder / "lesions.png", title="/".join(arguments.pred.absolute().parts[-3:]))
    logger.info("written to %s", folder)


def _add_ranking(commands: Subcommands) -> None:
    parser = _subcommand(
        commands,
        _ranking,
        "Which of several predictions a challenge would put first: ranks per case and metric, averaged.",
    )
    parser.add_argument(
        "predictions", type=Path, nargs="+", metavar="FOLDER", help="with the lesions.json of nnssl_evaluate lesions"
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="as in lesions.json (default: the preset's official)"
    )
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="write ranking.json here")
    _add_json(parser)


def _ranking(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.ranking import describe_ranking, official_metrics, rank, read_predictions
    from nnunet_ssl.evaluation.results import write_json

    tables, preset = read_predictions(arguments.predictions)
    result = {"preset": preset, **rank(tables, official_metrics(preset, arguments.metrics))}
    _show(result, describe_ranking(result), arguments)
    if arguments.o:
        write_json(result, arguments.o / "ranking.json")
        logger.info("written to %s", arguments.o)


def _add_missing(commands: Subcommands) -> None:
    parser = _subcommand(
        commands,
        _missing,
        "What models lose when channels are missing: every subset of the channels, beside its specialist.",
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
    parser.add_argument(
        "--preset", choices=("isles", "isles26", "atlas", "fcd"), default="isles", help="(default: isles)"
    )
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="predictions, missing.json, .tsv, .png")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring")
    parser.add_argument("-npp", type=int, default=0, metavar="N", help="processes for preprocessing (default: 0)")
    parser.add_argument("-nps", type=int, default=0, metavar="N", help="processes for export (default: 0)")
    parser.add_argument("-device", default="cuda", help="cuda, cuda:1, cpu, mps (default: cuda)")
    _add_json(parser)


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
    _show(result, describe_missing(result), arguments)
    write_json(result, arguments.o / "missing.json")
    write_tsv(cases, arguments.o / "missing.tsv")
    draw_missing(result, arguments.o / "missing.png")
    logger.info("written to %s", arguments.o)


def _add_calibration(commands: Subcommands) -> None:
    parser = _subcommand(
        commands,
        _calibration,
        "What a model's probabilities and volumes are worth, by the cases that its folds held out.",
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
        "--coverage", type=_share, default=0.9, metavar="SHARE", help="of the volumes' intervals (default: 0.9)"
    )
    parser.add_argument("-np", type=positive, default=1, metavar="N", help="processes (default: 1)")
    _add_json(parser)


def _share(text: str) -> float:
    """Read a number between 0 and 1, both excluded."""
    try:
        if 0 < (value := float(text)) < 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not a number between 0 and 1")


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
    _show(result, describe(result), arguments)
    write_json(result | {"point": asdict(point)}, folder / FILE)
    draw_calibration(counts, result, folder / "calibration.png", title=" + ".join(model.name for model in models))
    logger.info("written to %s", folder)


def _add_probe(commands: Subcommands) -> None:
    parser = _subcommand(
        commands, _probe, "What a frozen representation knows of a scan: linear probes, split by subject."
    )
    _add_embedding_source(parser, max_subjects=10_000)
    _add_target(parser)
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write probe.json, predictions.tsv, probe.png and new embeddings here"
    )
    _add_json(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", default="age", metavar="COLUMN", help="of the manifest or the metadata (default: age)"
    )
    parser.add_argument(
        "--task",
        choices=("auto", "regression", "classification"),
        default="auto",
        help="auto: a regression when the column holds more than ten different numbers",
    )
    parser.add_argument(
        "--modalities", nargs="+", default=[], metavar="NAME", help="learn from and predict no other scans"
    )
    parser.add_argument(
        "--across",
        action="store_true",
        help="learn from each modality alone, too, and predict all of them: across.tsv, across.png",
    )
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="of the cross-validation (default: 5)")


def _probe(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.probes import probe

    embeddings, name = _embeddings(arguments)
    result = probe(
        embeddings,
        arguments.target,
        task=arguments.task,
        folds=arguments.folds,
        across=arguments.across,
        modalities=arguments.modalities,
    )
    _report_prediction(result, "probe", name, arguments)
    if arguments.o and arguments.checkpoint:
        from nnunet_ssl.evaluation.embeddings import write_embeddings

        write_embeddings(embeddings, arguments.o)


def _report_prediction(result: Prediction, stem: str, title: str, arguments: argparse.Namespace) -> None:
    """Show what was predicted of scans, and write it to the folder that was asked for, if one was."""
    from nnunet_ssl.evaluation.scan_prediction import across_table, describe_prediction

    _show(result.summary, describe_prediction(result.summary), arguments)
    if not arguments.o:
        return
    from nnunet_ssl.evaluation.figures.across import draw_across
    from nnunet_ssl.evaluation.figures.prediction import draw_prediction
    from nnunet_ssl.evaluation.results import write_json, write_tsv

    write_json(result.summary, arguments.o / f"{stem}.json")
    write_tsv(result.predictions, arguments.o / "predictions.tsv")
    draw_prediction(result, arguments.o / f"{stem}.png", title=title)
    if arguments.across:
        write_tsv(across_table(result.summary), arguments.o / "across.tsv")
        write_tsv(result.across, arguments.o / "across_predictions.tsv")
        draw_across(result.summary, arguments.o / "across.png", title=title)
    logger.info("written to %s", arguments.o)


def _add_finetune(commands: Subcommands) -> None:
    parser = _subcommand(
        commands,
        _finetune,
        "What an encoder can learn of whole scans: fine-tuned with a linear head, split by subject.",
    )
    _add_encoder_and_corpus(parser, max_subjects=10_000, required=True)
    _add_target(parser)
    parser.add_argument(
        "--scratch", action="store_true", help="take the checkpoint's architecture, and random weights: the twin"
    )
    parser.add_argument("--steps", type=positive, default=500, metavar="N", help="of a training (default: 500)")
    parser.add_argument(
        "--batch_size",
        type=_several,
        default=8,
        metavar="N",
        help="scans of a step (default: 8)",
    )
    parser.add_argument(
        "--learning_rate",
        type=_share,
        default=5e-4,
        metavar="LR",
        help="of the head; a pre-trained encoder learns at a tenth of it (default: 5e-4)",
    )
    parser.add_argument(
        "--box", type=positive, nargs=3, metavar="N", help="voxels that are seen of a scan (default: all brains fit)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of new weights, order and augmentation; the folds stay (default: 0)"
    )
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write finetune.json, predictions.tsv and finetune.png here"
    )
    _add_json(parser)


def _several(text: str) -> int:
    """Read a whole number above 1: the head's normalisation compares the scans of a batch."""
    if (number := positive(text)) == 1:
        raise argparse.ArgumentTypeError("a batch has at least 2 scans")
    return number


def _finetune(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.devices import find_device
    from nnunet_ssl.evaluation.scan_finetuning import FinetuningConfig, finetune_scans

    config = FinetuningConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        scratch=arguments.scratch,
        box=arguments.box and tuple(arguments.box),
        max_subjects=arguments.max_subjects,
        seed=arguments.seed,
    )
    result = finetune_scans(
        arguments.checkpoint,
        arguments.d,
        arguments.target,
        config,
        find_device(arguments.device),
        across=arguments.across,
        task=arguments.task,
        modalities=arguments.modalities,
        folds=arguments.folds,
    )
    name = _name_of(arguments.checkpoint)
    _report_prediction(result, "finetune", f"{name} from scratch" if arguments.scratch else name, arguments)


def _add_gradients(commands: Subcommands) -> None:
    parser = _subcommand(commands, _gradients, "Which branch of a pre-training moves the encoder, over its steps.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a pre-training, or a progress.csv")
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="write gradients.json and gradients.png here")
    _add_json(parser)


def _gradients(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.gradients import describe_gradients, measure_gradients, read_runs

    runs = read_runs(arguments.runs)
    result = measure_gradients(runs)
    _show(result, describe_gradients(result), arguments)
    if arguments.o:
        from nnunet_ssl.evaluation.figures.gradients import draw_gradients
        from nnunet_ssl.evaluation.results import write_json

        write_json(result, arguments.o / "gradients.json")
        draw_gradients(runs, arguments.o / "gradients.png")
        logger.info("written to %s", arguments.o)
