"""From trained models to a folder that builds into a container, and holds all it needs to run without a network."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nnunet_ssl
from nnunet_ssl.conversion.preparations import PREPARATIONS
from nnunet_ssl.deployment.segmenting import MODEL, reads_turned
from nnunet_ssl.deployment.weights import FOLDER, write_digests
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import calibration, operating_point
from nnunet_ssl.interface.segmentation import default_folds, finished_folds
from nnunet_ssl.nnunet_folders import channel_names
from nnunet_ssl.weights.safe_files import read_file

CHECKPOINT = "checkpoint_final.pth"
NEEDED = ("network_weights", "trainer_name", "inference_allowed_mirroring_axes")
"""What prediction takes from a checkpoint, beside the configuration's name. The optimizer's state is twice as large as
the weights."""

EXTERNAL_TRAINERS = "nnUNet_extTrainer"
TEMPLATES = Path(__file__).parent / "templates"

logger = logging.getLogger(__name__)


def package(
    models: Sequence[Path], target: Path, *, folds: Sequence[str] | None = None, learned: Path | None = None
) -> None:
    """Write a package.

    Args:
        models: nnU-Net's folders of trained models; the probabilities of several are averaged.
        target: a new or empty folder.
        folds: of each model; None takes those that are trained to their end.
        learned: the folder of an operating point, a calibration, or both; None takes the only model's, if it has any.

    Raises:
        UserError: a model can't be packaged, the models do not fit each other, or `target` is not empty.
    """
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty: name a new folder for the package.")
    described = [_describe(model, folds) for model in models]
    for model, other in zip(models[1:], described[1:]):
        for key in ("labels", "channels", "prepared_as", "turn_to_ras"):
            if other[key] != described[0][key]:
                raise UserError(f"{models[0]} and {model} differ in {key}: {described[0][key]} and {other[key]}.")
    files = _find_learned(models, learned)
    try:
        _write(models, described, files, target)
    except BaseException:
        for path in target.glob("*"):  # half a package would be in the way of the next attempt
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _write(models: Sequence[Path], described: Sequence[dict[str, Any]], learned: Sequence[Path], target: Path) -> None:
    weights = target / FOLDER
    for number, (model, about) in enumerate(zip(models, described)):
        _copy_model(model, about["folds"], weights / f"model_{number}")
    content = {f"model_{number}": about["folds"] for number, about in enumerate(described)}
    (weights / MODEL).write_text(json.dumps({"models": content, "turn_to_ras": described[0]["turn_to_ras"]}) + "\n")
    for file in learned:
        shutil.copy(file, weights / file.name)
    write_digests(target)
    _copy_program(target / "app", {about["trainer"] for about in described})
    (target / "requirements.txt").write_text("\n".join(_requirements({about["package"] for about in described})) + "\n")
    values = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for template in sorted(TEMPLATES.iterdir()):
        (target / template.name).write_text(Template(template.read_text()).substitute(values))


def _describe(model: Path, folds: Sequence[str] | None) -> dict[str, Any]:
    """Return what of a model must agree with other models, and what of it is to be packaged."""
    try:
        plans, dataset = (json.loads((model / name).read_text()) for name in ("plans.json", "dataset.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{model} is no folder of a model that nnU-Net trained ({error}).") from error
    found = finished_folds(model, CHECKPOINT)
    chosen = list(folds) if folds else default_folds(found)
    missing = [name for name in chosen if name not in found]
    if missing or not chosen:
        raise UserError(
            f"{model} has no {CHECKPOINT} of {'fold ' + missing[0] if missing else 'any fold'}: train to the end, or "
            f"choose with -f among those that are: {', '.join(found) or 'none'}."
        )
    if dataset.get("skull_strip"):
        logger.warning(
            "%s was trained on skull-stripped images, and the package strips none: give it stripped ones.", model
        )
    prepared_as = dataset.get("prepared_as")
    if prepared_as is not None and prepared_as not in PREPARATIONS:
        logger.warning(
            "%s was trained on images that a conversion of yours prepared (%s), and the package takes images as they "
            "are: give it images that were prepared likewise, by --images_only of that conversion.", model, prepared_as,
        )  # fmt: skip
    turned = reads_turned(plans, model)
    if not turned:
        logger.warning(
            "%s was trained on images as they were stored. What is stored in another orientation than its training "
            "images is segmented as it is, and likely badly.", model,
        )  # fmt: skip
    checkpoint = read_file(model / f"fold_{chosen[0]}" / CHECKPOINT).content
    settings = plans["configurations"][checkpoint["init_args"]["configuration"]]
    if settings.get("previous_stage"):
        raise UserError(f"{model} is the second stage of a cascade, which can't be packaged.")
    while "architecture" not in settings:
        settings = plans["configurations"][settings["inherits_from"]]
    return {
        "labels": dataset["labels"],
        "channels": channel_names(dataset),
        "prepared_as": prepared_as,
        "turn_to_ras": turned,
        "folds": [name if name == "all" else int(name) for name in chosen],
        "trainer": checkpoint["trainer_name"],
        "package": settings["architecture"]["network_class_name"].partition(".")[0],
    }


def _copy_model(model: Path, folds: Sequence[int | str], target: Path) -> None:
    for fold in folds:
        source = model / f"fold_{fold}" / CHECKPOINT
        content = read_file(source).content
        kept: dict[str, Any] = {name: content.get(name) for name in NEEDED}
        kept["init_args"] = {"configuration": content["init_args"]["configuration"]}
        (target / f"fold_{fold}").mkdir(parents=True)
        torch.save(kept, target / f"fold_{fold}" / CHECKPOINT)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(model / name, target / name)


def _find_learned(models: Sequence[Path], learned: Path | None) -> list[Path]:
    """Find what nnssl_operate and nnssl_evaluate calibration left: the operating point and the calibration.

    Raises:
        UserError: the named folder has neither, or the calibration was measured at another operating point.
    """
    names = (operating_point.FILE, calibration.FILE)
    folders = models if learned is None and len(models) == 1 else [learned] if learned else []
    found = {name: folder / name for folder in folders for name in names if (folder / name).is_file()}
    if learned is not None and not found:
        raise UserError(f"{learned} holds neither {' nor '.join(names)}: nnssl_operate writes the first.")
    point = operating_point.OperatingPoint()
    if operating_point.FILE in found:
        point = operating_point.load(found[operating_point.FILE])
        logger.info("operating point: %s", point)
    else:
        logger.info("No operating point: masks will be nnU-Net's own. nnssl_operate chooses one.")
    if calibration.FILE in found and not calibration.is_of(found[calibration.FILE], point):
        raise UserError(
            f"{found[calibration.FILE]} holds volumes of another operating point: run nnssl_evaluate calibration again."
        )
    return list(found.values())


def _copy_program(app: Path, trainers: set[str]) -> None:
    """Copy this package, what its installation says of it, and trainers that belong to neither it nor nnU-Net."""
    source = Path(nnunet_ssl.__file__).parent
    shutil.copytree(source, app / "nnunet_ssl", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    try:
        text = metadata.distribution("nnunet_ssl").read_text("METADATA")
    except metadata.PackageNotFoundError:
        text = None
    if text:
        about = app / f"nnunet_ssl-{nnunet_ssl.__version__}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(text)
    for trainer in sorted(trainers):
        _copy_trainer(trainer, app / "trainers")


def _copy_trainer(name: str, target: Path) -> None:
    """Copy the folder of a trainer that nnU-Net finds by ``nnUNet_extTrainer``; nnU-Net's own and ours are there.

    Raises:
        UserError: nnU-Net does not find it here, or it was added to nnU-Net's own folder.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        trainer = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise UserError(f"nnU-Net does not find the trainer {name}, so it can't be packaged: install it.") from error
    module = trainer.__module__
    if module.startswith("nnunet_ssl."):
        return
    if module.startswith("nnunetv2."):
        file = Path(*module.split(".")).with_suffix(".py")
        released = metadata.files("nnunetv2") or []
        if released and file.as_posix() not in {path.as_posix() for path in released}:
            raise UserError(
                f"{name} lies in {file}, which is not of nnU-Net's release, so the container would lack it: move it "
                "to a folder of its own that nnUNet_extTrainer names."
            )
        return
    for folder in map(Path, filter(None, os.environ.get(EXTERNAL_TRAINERS, "").split(os.pathsep))):
        if (folder / Path(*module.split("."))).with_suffix(".py").is_file():
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            return
    raise UserError(f"The trainer {name} comes from {module}, whose file is not in a folder of nnUNet_extTrainer.")


def _distributions_of(package: str) -> list[str]:
    """Return what is to be installed for a package to be imported: mostly what has its name, which is quicker told."""
    try:
        return [metadata.distribution(package).name]
    except metadata.PackageNotFoundError:
        return metadata.packages_distributions().get(package, [])


def _requirements(packages: set[str]) -> list[str]:
    """Return the installed versions of all that this package and the networks' packages need, as pip takes them."""
    waiting = ["nnunet_ssl", *(name for package in sorted(packages) for name in _distributions_of(package))]
    found: dict[str, str] = {}
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = f"{name}=={Version(distribution.version).public}"
        needed = map(Requirement, distribution.requires or ())
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return sorted(text for name, text in found.items() if name != canonicalize_name("nnunet_ssl"))
