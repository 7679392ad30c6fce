"""What a run of a study is made of: commands of nnU-Net and of this package, and the files that prove they are done.

Nothing is remembered elsewhere: a fold that was trained by hand counts, and one whose files are gone is trained again.
What was made from a file that has changed since is made again: a retrained fold is predicted and evaluated anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import (
    FORMER_PLANS_NAME,
    PLANS_NAME,
    dataset_folder,
    dataset_id,
    folder_of,
    folders_with_id,
)
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.run.outputs import CONFIG
from nnunet_ssl.studies.study import CLASSES, AnyRun, Arm, Dataset, Making, Measurement, Pretraining, Run, Study
from nnunet_ssl.trainers import checkpoints
from nnunet_ssl.trainers.networks import plans_residual_unet
from nnunet_ssl.trainers.plans import plans_with_settings
from nnunet_ssl.trainers.settings import VARIABLE, Settings
from nnunet_ssl.weights.pretrained import ENCODER
from nnunet_ssl.weights.zoo import named_checkpoint

if TYPE_CHECKING:
    from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL

NOTE = "command.txt"
"""Beside the results of an evaluation or a measurement: of which command they are; of an arm's models: their start."""


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
        note: where the runner writes down what the outputs are of, before the command runs, or after it if the note is
            the output: if nothing else tells that it is done. Without a note, the outputs alone count.
        noted: what it writes there.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    unfinished: Path | None = None
    lock: Path | None = None
    note: Path | None = None
    noted: str = ""

    def is_done(self) -> bool:
        """Tell whether the outputs are there, none is older than an input, and no other command made them."""
        try:
            made = min(path.stat().st_mtime_ns for path in self.outputs)
            return all(path.stat().st_mtime_ns <= made for path in self.inputs) and not self.made_otherwise()
        except FileNotFoundError:
            return False

    def made_otherwise(self) -> str:
        """Return what the outputs, which are there, are of, if it is not what they are to be of; else ""."""
        if self.note is None or not self.note.is_file() or not all(path.exists() for path in self.outputs):
            return ""
        found = self.note.read_text()
        return found if found != self.noted else ""

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
    corpora = folders_with_id(folder / "pretrained", run.corpus) or [folder / "pretrained" / f"Dataset{run.corpus:03d}"]
    return corpora[0] / run.name


def pretrained_encoder(run: Pretraining, folder: Path) -> Path:
    """What a pre-training leaves when it is finished."""
    return pretrained(run, folder) / ENCODER


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
            note=mark,
            noted=command,
        )
        for place, (command, mark) in enumerate(zip(run.commands, marks, strict=True), start=1)
    ]


def refuse_changes(study: Study, folder: Path) -> None:
    """Refuse a study whose data or encoders were made as its file no longer says: all that follows was made from them.

    Raises:
        UserError: a command of its synthetic data, a setting of a pre-training, or what the models of an arm start from
            has changed since.
    """
    for run in study.runs():
        if isinstance(run, Making):
            for stage in _making(run, folder):
                if before := stage.made_otherwise():
                    raise UserError(
                        f"synthetic.{run.name} was made by '{before}', and now is to be by '{stage.noted}'. "
                        f"{_advice(folder)}"
                    )
        elif isinstance(run, Pretraining) and (recorded := pretrained(run, folder) / CONFIG).is_file():
            then, now = (
                replace(config, workers=0).as_dict()  # has no influence
                for config in (load_config(recorded), load_config(run.recipe, list(run.overrides)))
            )
            if changed := [key for key in now if now[key] != then.get(key)]:
                raise UserError(
                    f"The pre-training {run.name} has other settings than the study has now: {', '.join(changed)} "
                    f"(see {recorded}). {_advice(folder)}"
                )
    for arm in study.arms:
        _refuse_another_start(arm, study, folder)


def _advice(folder: Path) -> str:
    return (
        "What was made from it is of no use to the study as it is now: give that another folder (-o), or remove "
        f"{folder}."
    )


def _start(arm: str, study: Study) -> str:
    """What the models start from that an arm keeps in the study; "" of an arm that keeps none."""
    pretraining = study.pretraining_of(arm, seed=0)
    return f"the pre-training of {pretraining.arm}" if pretraining else study.arms[arm].checkpoint or ""


def _refuse_another_start(arm: str, study: Study, folder: Path) -> None:
    note, now = folder / "models" / arm / NOTE, _start(arm, study)
    if now and note.is_file() and (before := note.read_text()) != now:
        raise UserError(f"The models of {arm} start from {before}, and now are to start from {now}. {_advice(folder)}")


def _pretraining(run: Pretraining, folder: Path, device: str) -> Stage:
    """The results lie in the study, for what a user pre-trains by hand under nnU-Net's results is another run."""
    corpus = dataset_folder(run.corpus, "nnUNet_preprocessed")
    results = folder / "pretrained" / corpus.name / run.name
    resume = ("--c",) if any(results.glob("checkpoint_*.pth")) else ()
    return Stage(
        name="pretrain",
        command=(
            *("nnssl_pretrain", "-c", run.recipe, "-d", str(run.corpus), "-device", device),
            *(*resume, "--set", *run.overrides),
        ),
        outputs=(results / ENCODER,),
        variables={"nnUNet_results": str(folder / "pretrained")},
    )


def _measurement(run: Measurement, study: Study, folder: Path, device: str) -> Stage:
    dataset_folder(run.corpus, "nnUNet_preprocessed")
    out = results_of(run, folder)
    checkpoint = _checkpoint(run, study, folder, residual=_trains_residual(study))
    trainer = _own_trainers().get(study.arms[run.arm].trainer)
    scratch = ("--scratch",) if run.kind == "finetune" and trainer is not None and trainer.from_scratch else ()
    # of weights, order and augmentation; that of a probe would change its folds
    seed = ("--seed", str(run.seed)) if run.kind == "finetune" and run.seed else ()
    command = (
        *("nnssl_evaluate", run.kind, "--checkpoint", str(checkpoint), "-d", str(run.corpus)),
        *(*seed, *shlex.split(run.options), *scratch),
    )
    return Stage(
        name="measure",
        command=(*command, "-device", device, "-o", str(out)),
        outputs=(out / f"{run.kind}.json",),
        inputs=(checkpoint,),
        note=out / NOTE,
        noted=_within(folder, command),
    )


def _within(folder: Path, command: Sequence[str]) -> str:
    """A command as it stays when the study is moved."""
    return shlex.join(command).replace(str(folder), "$study")


def _segmentation(run: Run, study: Study, folder: Path, device: str) -> list[Stage]:
    arm, dataset = study.arms[run.arm], study.datasets[run.dataset]
    raw, preprocessed = (dataset_folder(dataset.id, name) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    plans = _plans(preprocessed, study)
    variables = _variables(run, study, folder)
    _refuse_another_start(run.arm, study, folder)
    start = _start(run.arm, study)
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
        noted=_within(folder, command),
    )


def _variables(run: Run, study: Study, folder: Path) -> dict[str, str]:
    """Settings and checkpoint of a training.

    nnU-Net's folder names do not tell checkpoints apart, so an arm that names one keeps its models in the study.
    """
    settings, arm = {VARIABLE: run.settings}, study.arms[run.arm]
    if pretraining := study.pretraining_of(run.arm, run.seed):
        checkpoint = pretrained_encoder(pretraining, folder)
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
            raise UserError(
                f"{arm.trainer} is not a trainer of nnunet_ssl: it would ignore '{run.settings}'. "
                "`settings: null` keeps an arm free of the study's."
            )
        return plans["plans_name"]
    return plans_with_settings(plans, Settings.of_plans(plans).updated(run.settings))["plans_name"]


def _checkpoint(run: Run | Measurement, study: Study, folder: Path, *, residual: bool) -> Path:
    """The file that an arm starts from, found as its trainer finds it (see :func:`checkpoints.find_checkpoint`).

    Raises:
        UserError: there is none.
    """
    arm = study.arms[run.arm]
    if pretraining := study.pretraining_of(run.arm, run.seed):
        path = pretrained_encoder(pretraining, folder)
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
