"""What a run of a study is made of: commands of nnU-Net and of this package, and the files that prove they are done.

Nothing is remembered elsewhere: a fold that was trained by hand counts, and one whose files are gone is trained again.
What was made from a file that has changed since is made again: a retrained fold is predicted and evaluated anew.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import dataset_folder
from nnunet_ssl.studies.places import results_of
from nnunet_ssl.studies.segmentation import segmentation
from nnunet_ssl.studies.stage import NOTE, Stage, within
from nnunet_ssl.studies.starts import checkpoint_of, own_trainers, trains_residual
from nnunet_ssl.studies.study import AnyRun, Making, Measurement, Pretraining, Study
from nnunet_ssl.weights.pretrained import ENCODER


def stages_of(run: AnyRun, study: Study, folder: Path, device: str) -> list[Stage]:
    """List the commands of a run, in order.

    Args:
        folder: of the study.
        device: cpu, cuda or mps.

    Raises:
        UserError: the study's data are not all made, the data set is not prepared, the arm has no checkpoint yet, or
            none of its own to be measured.
    """
    for data in study.makings:  # in their order, and whole: half of a data set looks like a whole one
        if data == run:
            break
        if not all(stage.is_done() for stage in making(data, folder)):
            raise UserError(f"The data are made first: {data.id}.")
    match run:
        case Making():
            return making(run, folder)
        case Pretraining():
            return [_pretraining(run, folder, device)]
        case Measurement():
            return [_measurement(run, study, folder, device)]
    return segmentation(run, study, folder, device)


def making(run: Making, folder: Path) -> list[Stage]:
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
    checkpoint = checkpoint_of(run, study, folder, residual=trains_residual(study))
    trainer = own_trainers().get(study.arms[run.arm].trainer)
    from_scratch = trainer is not None and trainer.from_scratch
    if from_scratch and run.kind != "finetune":
        raise UserError(
            f"The arm {study.arms[run.arm].label} starts from random weights, and {run.kind} measures a checkpoint's "
            "encoder as it is: name the experiment's arms without it."
        )
    scratch = ("--scratch",) if from_scratch else ()
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
        noted=within(folder, command),
    )
