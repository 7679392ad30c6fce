"""What a run of a study is made of: commands of nnU-Net and of this package, and the files that prove they are done.

Nothing is remembered elsewhere: a fold that was trained by hand counts, and one whose files are gone is trained again.
What was made from a file that has changed since is made again: a retrained fold is predicted and evaluated anew.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.study import CLASSES, AnyRun, Arm, Dataset, Making, Measurement, Pretraining, Run, Study
from nnunet_ssl.nnunet_folders import (
    FORMER_PLANS_NAME,
    PLANS_NAME,
    dataset_folder,
    dataset_id,
    folder_of,
    folders_with_id,
)
from nnunet_ssl.trainers import checkpoints
from nnunet_ssl.trainers.networks import plans_residual_unet
from nnunet_ssl.trainers.plans import plans_with_settings
from nnunet_ssl.trainers.settings import VARIABLE, Settings
from nnunet_ssl.weights.zoo import named_checkpoint

if TYPE_CHECKING:
    from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a run.

    Attributes:
        name: make, pretrain, train, predict, evaluate or measure.
        command: program and arguments.
        outputs: the files or folders that are there when it is done.
        inputs: what they are made from, as far as it can change: what an earlier stage writes, or a checkpoint.
        variables: added to the environment.
        unfinished: where the command writes what is renamed to the first output when it has succeeded.
        lock: beside the folder of a fold, which studies share; None for what lies in this study alone.
        marked: the output is a mark that the runner leaves: nothing that the command writes tells that it is done.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    unfinished: Path | None = None
    lock: Path | None = None
    marked: bool = False

    def is_done(self) -> bool:
        """Tell whether the outputs are there, and none is older than an input."""
        try:
            made = min(path.stat().st_mtime_ns for path in self.outputs)
            return all(path.stat().st_mtime_ns <= made for path in self.inputs)
        except FileNotFoundError:
            return False

    def remove_outputs(self) -> None:
        for path in self.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def stages_of(run: AnyRun, study: Study, folder: Path, device: str) -> list[Stage]:
    """List the commands of a run, in order.

    Args:
        folder: of the study.
        device: cpu, cuda or mps.

    Raises:
        UserError: the data set is not prepared, or the arm has no checkpoint yet.
    """
    match run:
        case Making():
            return _making(run, folder)
        case Pretraining():
            return [_pretraining(run, folder, device)]
        case Measurement():
            return [_measurement(run, study, folder, device)]
    return _segmentation(run, study, folder, device)


def results_of(run: AnyRun, folder: Path) -> Path:
    """Where the evaluations of a run lie."""
    return folder / "results" / run.id


def pretrained(run: Pretraining, folder: Path) -> Path:
    """The folder of a pre-training's results; it is there once the pre-training has begun."""
    found = sorted((folder / "pretrained").glob(f"Dataset{run.corpus:03d}_*/{run.name}"))
    return found[0] if found else folder / "pretrained" / f"Dataset{run.corpus:03d}" / run.name


def own_nnunet_folders(folder: Path) -> dict[str, str]:
    """nnU-Net's folders of a study that makes its data itself, by the variables that name them."""
    return {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}


def _making(run: Making, folder: Path) -> list[Stage]:
    """One stage per command, each with a mark that it is done; what is made anew takes the marks of what follows."""

    def filled(word: str) -> str:
        return os.path.expandvars(word.replace("$work", str(folder / "work")))

    marks = [folder / "made" / f"{run.name}_{place}" for place, _ in enumerate(run.commands, start=1)]
    return [
        Stage(
            name=f"make {run.name} ({place} of {len(marks)})",
            command=tuple(map(filled, shlex.split(command))),
            outputs=(mark,),
            inputs=tuple(marks[: place - 1]),
            marked=True,
        )
        for place, (command, mark) in enumerate(zip(run.commands, marks, strict=True), start=1)
    ]


def _pretraining(run: Pretraining, folder: Path, device: str) -> Stage:
    """The results lie in the study, for what a user pre-trains by hand under nnU-Net's results is another run."""
    corpus = dataset_folder(run.corpus, "nnUNet_preprocessed")
    results = folder / "pretrained" / corpus.name / run.name
    resume = ("--c",) if any(results.glob("checkpoint_*.pth")) else ()
    settings = (f"recipe={run.name}", f"seed={run.seed}", *run.settings)
    return Stage(
        name="pretrain",
        command=(
            *("nnssl_pretrain", "-c", run.recipe, "-d", str(run.corpus), "-device", device),
            *(*resume, "--set", *settings),
        ),
        outputs=(results / "encoder.safetensors",),
        variables={"nnUNet_results": str(folder / "pretrained")},
    )


def _measurement(run: Measurement, study: Study, folder: Path, device: str) -> Stage:
    dataset_folder(run.corpus, "nnUNet_preprocessed")
    out = results_of(run, folder)
    checkpoint = _checkpoint(run, study, folder, residual=_trains_residual(study))
    trainer = _own_trainers().get(study.arms[run.arm].trainer)
    scratch = ("--scratch",) if run.kind == "finetune" and trainer is not None and trainer.from_scratch else ()
    command = (
        *("nnssl_evaluate", run.kind, "--checkpoint", str(checkpoint), "-d", str(run.corpus)),
        *(*shlex.split(run.options), *scratch, "-device", device, "-o", str(out)),
    )
    return Stage(name="measure", command=command, outputs=(out / f"{run.kind}.json",), inputs=(checkpoint,))


def _segmentation(run: Run, study: Study, folder: Path, device: str) -> list[Stage]:
    arm, dataset = study.arms[run.arm], study.datasets[run.dataset]
    raw, preprocessed = (dataset_folder(dataset.id, name) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    plans = _plans(preprocessed, study)
    variables = _variables(run, study, folder)
    final = _plans_name(plans, run, arm)
    fold = (
        Path(variables.get("nnUNet_results") or folder_of("nnUNet_results"))
        / raw.name
        / f"{arm.trainer}__{final}__{study.configuration}"
        / f"fold_{run.fold}"
    )
    train = ("nnUNetv2_train", str(dataset.id), study.configuration, str(run.fold), "-tr", arm.trainer)
    resume = ("--c",) if any(fold.glob("checkpoint_*.pth")) else ()
    if not resume and _needs_checkpoint(arm):
        _checkpoint(run, study, folder, residual=plans_residual_unet(plans))
    final_weights, validated = fold / "checkpoint_final.pth", fold / "validation" / "summary.json"
    in_fold = partial(Stage, variables=variables, lock=fold.with_name(f".{fold.name}.lock"))
    evaluation = partial(_evaluation, out=results_of(run, folder), preset=dataset.preset)
    stages = [
        in_fold(
            name="train",
            command=(*train, "-p", study.plans, "-device", device, *resume),
            outputs=(final_weights, validated),
            inputs=(final_weights,),  # of the validation with which a training ends
        ),
        evaluation("validation", reference=preprocessed / "gt_segmentations", predicted=fold / "validation"),
    ]
    model = ("-d", str(dataset.id), "-c", study.configuration, "-f", str(run.fold), "-tr", arm.trainer, "-p", final)
    for part, images, labels in _test_sets(study, dataset, raw):
        unfinished = fold / f"{part}.unfinished"
        files = ("-i", str(images), "-o", str(unfinished))
        stages += [
            in_fold(
                name="predict",
                command=("nnUNetv2_predict", *files, *model, *shlex.split(study.prediction), "-device", device),
                outputs=(fold / part,),
                inputs=(final_weights,),
                unfinished=unfinished,
            ),
            evaluation(part, reference=labels, predicted=fold / part),
        ]
    return stages


def _test_sets(study: Study, dataset: Dataset, raw: Path) -> Iterator[tuple[str, Path, Path]]:
    """Name, images and labels: the data set's own labelled test set, and the data sets that it names as tests."""
    if any((raw / "labelsTs").glob("[!.]*")):
        yield "test", raw / "imagesTs", raw / "labelsTs"
    for part, name in dataset.tests.items():
        other = dataset_folder(study.datasets[name].id, "nnUNet_raw")
        yield part, other / "imagesTr", other / "labelsTr"


def _evaluation(part: str, *, reference: Path, predicted: Path, preset: str, out: Path) -> Stage:
    """Of the validation, a fold's cases are compared, which are some of the references.

    A validation writes its masks over those of an earlier one, which leaves their folder's time: its summary tells.
    """
    validation = part == "validation"
    made_from = (predicted / "summary.json" if validation else predicted,)
    command: tuple[str, ...]
    if preset == CLASSES:
        summary, model = out / part / "summary.json", predicted.parent.parent
        files = ("-djfile", str(model / "dataset.json"), "-pfile", str(model / "plans.json"), "-o", str(summary))
        command = ("nnUNetv2_evaluate_folder", str(reference), str(predicted), *files, "--chill")
        return Stage(name="evaluate", command=command, outputs=(summary,), inputs=made_from)
    command = ("nnssl_evaluate", "lesions", "-ref", str(reference), "-pred", str(predicted), "--preset", preset)
    return Stage(
        name="evaluate",
        command=(*command, "-o", str(out / part), *(("--chill",) if validation else ())),
        outputs=(out / part / "lesions.json",),
        inputs=made_from,
    )


def _variables(run: Run, study: Study, folder: Path) -> dict[str, str]:
    """Settings and checkpoint of a training.

    nnU-Net's folder names do not tell checkpoints apart, so an arm that names one keeps its models in the study.
    """
    settings, arm = {VARIABLE: run.settings}, study.arms[run.arm]
    if pretraining := study.pretraining_of(run.arm, run.seed):
        checkpoint = pretrained(pretraining, folder) / "encoder.safetensors"
    elif arm.checkpoint is not None:
        checkpoint = _named(arm.checkpoint, arm)
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
    planner = "nnssl_plan" if study.plans in (PLANS_NAME, FORMER_PLANS_NAME) else "nnUNetv2_plan_and_preprocess"
    advice = f"Prepare it: {planner} -d {dataset_id(preprocessed.name)}"
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


def _plans_name(plans: Mapping[str, Any], run: Run, arm: Arm) -> str:
    """The name that the trainer gives its plans; trainers of other packages know nothing of settings."""
    if arm.trainer not in _own_trainers():
        if run.settings:
            raise UserError(f"{arm.trainer} is not a trainer of nnunet_ssl: it would ignore '{run.settings}'.")
        return plans["plans_name"]
    return plans_with_settings(plans, Settings.of_plans(plans).updated(run.settings))["plans_name"]


def _checkpoint(run: Run | Measurement, study: Study, folder: Path, *, residual: bool) -> Path:
    """The file that an arm starts from, found as its trainer finds it (see :func:`checkpoints.find_checkpoint`).

    Raises:
        UserError: there is none.
    """
    arm = study.arms[run.arm]
    if pretraining := study.pretraining_of(run.arm, run.seed):
        path = pretrained(pretraining, folder) / "encoder.safetensors"
        if not path.is_file():
            raise UserError(f"The arm {arm.label} is pre-trained first: {pretraining.id}.")
        return path
    if arm.checkpoint is not None:
        return _named(arm.checkpoint, arm)
    recipe = getattr(_own_trainers().get(arm.trainer), "recipe", None)
    try:
        return checkpoints.find_checkpoint(recipe, arm.trainer, residual=residual)
    except UserError:
        advice = f"pre-train one (nnssl_pretrain -c {recipe}), or name" if recipe else "name"
        raise UserError(f"The arm {arm.label} has no checkpoint: {advice} one as its `checkpoint`.") from None


def _named(checkpoint: str, arm: Arm) -> Path:
    """The file that the study's YAML names for an arm."""
    path = named_checkpoint(os.path.expandvars(checkpoint))
    if not path.is_file():
        raise UserError(f"The arm {arm.label} names the checkpoint {checkpoint}, which is not there.")
    return path


def _trains_residual(study: Study) -> bool:
    """Tell whether the study's trainings, as far as their data are planned, take residual encoders."""
    preprocessed = folder_of("nnUNet_preprocessed")
    plans = [
        folder / f"{study.plans}.json"
        for dataset in study.datasets.values()
        for folder in folders_with_id(preprocessed, dataset.id)
    ]
    return any(plans_residual_unet(json.loads(path.read_text())) for path in plans if path.is_file())


def _needs_checkpoint(arm: Arm) -> bool:
    trainer = _own_trainers().get(arm.trainer)
    return trainer is not None and not trainer.from_scratch


@cache
def _own_trainers() -> dict[str, type[nnUNetTrainerSSL]]:
    """The trainers of this package, by name."""
    from nnunet_ssl.trainers.arms import ARMS, nnUNetTrainerSwinFPNScratch
    from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL

    return ARMS | {one.__name__: one for one in (nnUNetTrainerSSL, nnUNetTrainerSwinFPNScratch)}
