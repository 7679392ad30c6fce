"""The stages of a segmentation: nnU-Net trains a fold and predicts, its cases are compared with their references."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import FORMER_PLANS_NAME, PLANS_NAME, dataset_folder, dataset_id, folder_of
from nnunet_ssl.studies.places import pretrained_encoder, results_of
from nnunet_ssl.studies.stage import NOTE, Stage, within
from nnunet_ssl.studies.starts import (
    checkpoint_of,
    named_encoder,
    needs_checkpoint,
    own_trainers,
    refuse_another_start,
    start_of,
)
from nnunet_ssl.studies.study import CLASSES, Arm, Dataset, Run, Study
from nnunet_ssl.trainers import checkpoints
from nnunet_ssl.trainers.networks import plans_residual_unet
from nnunet_ssl.trainers.plans import plans_with_settings
from nnunet_ssl.trainers.settings import VARIABLE, Settings


def segmentation(run: Run, study: Study, folder: Path, device: str) -> list[Stage]:
    """Train a fold and compare its validation cases; predict and compare each test set.

    Raises:
        UserError: see :func:`nnunet_ssl.studies.stages.stages_of`.
    """
    arm, dataset = study.arms[run.arm], study.datasets[run.dataset]
    raw, preprocessed = (dataset_folder(dataset.id, name) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    plans = _plans(preprocessed, study)
    variables = _variables(run, study, folder)
    refuse_another_start(run.arm, study, folder)
    start = start_of(run.arm, study)
    final = _plans_name(plans, run, arm)
    fold = (
        Path(variables.get("nnUNet_results") or folder_of("nnUNet_results"))
        / raw.name
        / f"{arm.trainer}__{final}__{study.configuration}"
        / f"fold_{run.fold}"
    )
    train = ("nnUNetv2_train", str(dataset.id), study.configuration, str(run.fold), "-tr", arm.trainer)
    resume = ("--c",) if any(fold.glob("checkpoint_*.pth")) else ()
    if not resume and needs_checkpoint(arm):
        checkpoint_of(run, study, folder, residual=plans_residual_unet(plans))
    final_weights, validated = fold / "checkpoint_final.pth", fold / "validation" / "summary.json"
    in_fold = partial(Stage, variables=variables, lock=fold.with_name(f".{fold.name}.lock"))
    evaluation = partial(_evaluation, folder=folder, out=results_of(run, folder), preset=dataset.preset)
    stages = [
        in_fold(
            name="train",
            command=(*train, "-p", study.plans, "-device", device, *resume),
            outputs=(final_weights, validated),
            inputs=(final_weights,),  # of the validation with which a training ends
            note=folder / "models" / run.arm / NOTE if start else None,
            noted=start,
        ),
        evaluation("validation", reference=preprocessed / "gt_segmentations", predicted=fold / "validation"),
    ]
    model = ("-d", str(dataset.id), "-c", study.configuration, "-f", str(run.fold), "-tr", arm.trainer, "-p", final)
    for part, images, labels in _test_sets(study, dataset, raw):
        predicted = fold / _prediction_name(study, part, images)
        unfinished = predicted.with_name(f"{predicted.name}.unfinished")
        files = ("-i", str(images), "-o", str(unfinished))
        stages += [
            in_fold(
                name="predict",
                command=("nnUNetv2_predict", *files, *model, *shlex.split(study.prediction), "-device", device),
                outputs=(predicted,),
                inputs=(final_weights,),
                unfinished=unfinished,
            ),
            evaluation(part, reference=labels, predicted=predicted),
        ]
    return stages


def _prediction_name(study: Study, part: str, images: Path) -> str:
    """The folder of predictions in a fold, which studies share: each its own for what they differ in."""
    of = part if part == "test" else images.parent.name
    return "_".join([of, *re.findall(r"[\w.]+", study.prediction)])


def _test_sets(study: Study, dataset: Dataset, raw: Path) -> Iterator[tuple[str, Path, Path]]:
    """Name, images and labels: the data set's own labelled test set, and the data sets that it names as tests."""
    if any((raw / "labelsTs").glob("[!.]*")):
        yield "test", raw / "imagesTs", raw / "labelsTs"
    for part, name in dataset.tests.items():
        other = dataset_folder(study.datasets[name].id, "nnUNet_raw")
        yield part, other / "imagesTr", other / "labelsTr"


def _evaluation(part: str, *, reference: Path, predicted: Path, preset: str, folder: Path, out: Path) -> Stage:
    """Of the validation, a fold's cases are compared, which are some of the references.

    A validation writes its masks over those of an earlier one, which leaves their folder's time: its summary tells.
    """
    validation = part == "validation"
    files: tuple[str, ...]
    command: tuple[str, ...]
    if preset == CLASSES:
        output, model = out / part / "summary.json", predicted.parent.parent
        files = ("-djfile", str(model / "dataset.json"), "-pfile", str(model / "plans.json"), "-o", str(output))
        command = ("nnUNetv2_evaluate_folder", str(reference), str(predicted), *files)
    else:
        output = out / part / "lesions.json"
        files = ("-ref", str(reference), "-pred", str(predicted), "--preset", preset, "-o", str(out / part))
        command = ("nnssl_evaluate", "lesions", *files)
    command += ("--chill",) * validation
    return Stage(
        name="evaluate",
        command=command,
        outputs=(output,),
        inputs=(predicted / "summary.json" if validation else predicted,),
        note=out / part / NOTE,
        noted=within(folder, command),
    )


def _variables(run: Run, study: Study, folder: Path) -> dict[str, str]:
    """Settings and checkpoint of a training.

    nnU-Net's folder names do not tell checkpoints apart, so an arm that names one keeps its models in the study.
    """
    settings, arm = {VARIABLE: run.settings}, study.arms[run.arm]
    if pretraining := study.pretraining_of(run.arm, run.seed):
        checkpoint = pretrained_encoder(pretraining, folder)
    elif arm.checkpoint is not None:
        checkpoint = named_encoder(arm.checkpoint, arm)
    else:
        return settings
    models = folder / "models" / run.arm
    return settings | {checkpoints.VARIABLE: str(checkpoint), "nnUNet_results": str(models)}


def _plans(preprocessed: Path, study: Study) -> dict[str, Any]:
    """Read the plans that a training begins with.

    Raises:
        UserError: the data set is not preprocessed by them.
    """
    path = preprocessed / f"{study.plans}.json"
    advice = f"Prepare it: {_planning(study.plans, dataset_id(preprocessed.name))}"
    if study.plans == PLANS_NAME and (preprocessed / f"{FORMER_PLANS_NAME}.json").is_file():
        advice += f", or say plans: {FORMER_PLANS_NAME}, as those are called that nnssl_plan of version 0.1.0 wrote"
    if not path.is_file():
        raise UserError(f"{preprocessed.name} has no plans {path.name} in {preprocessed}. {advice}")
    plans = json.loads(path.read_text())
    configuration = plans["configurations"].get(study.configuration)
    if configuration is None:
        known = ", ".join(plans["configurations"])
        raise UserError(f"{path} has no configuration {study.configuration}; it has {known}.")
    if not (preprocessed / configuration["data_identifier"]).is_dir():
        raise UserError(f"{preprocessed.name} is planned and not preprocessed for {study.configuration}. {advice}")
    return plans


def _planning(plans: str, number: int) -> str:
    """The command that makes plans of a name; nnU-Net's planners of residual encoders have names of their own."""
    if plans in (PLANS_NAME, FORMER_PLANS_NAME):
        return f"nnssl_plan -d {number}"
    residual = re.fullmatch(r"nnUNetResEncUNet(M|L|XL)Plans", plans)
    planner = f" -pl nnUNetPlannerResEnc{residual[1]}" if residual else ""
    return f"nnUNetv2_plan_and_preprocess -d {number}{planner}"


def _plans_name(plans: Mapping[str, Any], run: Run, arm: Arm) -> str:
    """The name that the trainer gives its plans; trainers of other packages know nothing of settings."""
    if arm.trainer not in own_trainers():
        if run.settings:
            raise UserError(
                f"{arm.trainer} is not a trainer of nnunet_ssl: it would ignore '{run.settings}'. "
                "`settings: null` keeps an arm free of the study's."
            )
        return plans["plans_name"]
    return plans_with_settings(plans, Settings.of_plans(plans).updated(run.settings))["plans_name"]
