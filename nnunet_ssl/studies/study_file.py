"""Read a study from its YAML file, and refuse what could only fail later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.lesions import PRESETS
from nnunet_ssl.evaluation.segmentations import METRICS
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.studies.study import CLASSES, AnyRun, Arm, Dataset, Experiment, Published, Run, Study
from nnunet_ssl.typed import build


def shipped() -> dict[str, Path]:
    """Return the studies that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(str(resources.files(__package__) / "shipped")).glob("*.yaml"))}


def read_study(path_or_name: str, *, full: bool = False) -> Study:
    """Read a study from a YAML file, or one that comes with the package by its name.

    Args:
        path_or_name: of the study.
        full: with the changes that the file holds under ``full``, and "_full" at the end of its name.

    Raises:
        UserError: there is no such file, or it does not describe a study.
    """
    path = shipped().get(path_or_name, Path(path_or_name))
    if not path.is_file():
        raise UserError(
            f"There is no file {path}, and no study of that name comes with nnunet_ssl (there are: "
            f"{', '.join(shipped())})."
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path} does not describe a study: it holds no keys.")
    try:
        return study_from(_at_full_size(values) if full else values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def study_from(values: Mapping[str, Any]) -> Study:
    """Build a study from what its YAML holds.

    Raises:
        UserError: an unknown key, a name that is not defined, a value out of range, or two runs in one folder.
    """
    parts = {key: _mapping(values, key) for key in ("arms", "experiments")}
    parts["datasets"] = _mapping(values, "datasets") if "datasets" in values else {}
    elsewhere = (*parts, "slurm", "synthetic", "full")
    study = replace(
        build(Study, {key: value for key, value in values.items() if key not in elsewhere}),
        arms={name: _labelled(Arm, one, f"arms.{name}") for name, one in parts["arms"].items()},
        datasets={name: _dataset(one, f"datasets.{name}") for name, one in parts["datasets"].items()},
        experiments={
            name: _experiment(one, f"experiments.{name}", tuple(parts["arms"]), values.get("corpus", Study.corpus))
            for name, one in parts["experiments"].items()
        },
        slurm=dict(_mapping(values, "slurm")) if values.get("slurm") else {},
    )
    synthetic = _mapping(values, "synthetic") if values.get("synthetic") else {}
    study = replace(
        study, synthetic={name: _commands(one, f"synthetic.{name}", study.voxel_mm) for name, one in synthetic.items()}
    )
    _check(study)
    return study


def _at_full_size(values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values.get("full"), Mapping):
        raise UserError("it has no key 'full', which would say what changes at full size.")
    return _merged({**values, "name": f"{values.get('name')}_full"}, values["full"])


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the entries of `changes`, mapping by mapping; null takes an entry away."""
    merged = dict(values)
    for key, change in changes.items():
        if change is None:
            merged.pop(key, None)
        elif isinstance(change, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], change)
        else:
            merged[key] = change
    return merged


_NAME = re.compile(r"[A-Za-z0-9_+-]+")


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    found = values.get(key)
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"'{key}' must name at least one.")
    return {str(name): one for name, one in found.items()}


def _commands(values: Any, where: str, voxel_mm: float) -> tuple[str, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(one, str) and one.strip() for one in values):
        raise UserError(f"{where} is {values!r}; it takes a list of commands.")
    return tuple(one.replace("$voxel_mm", f"{voxel_mm:g}") for one in values)


Labelled = TypeVar("Labelled", Arm, Dataset)


def _labelled(kind: type[Labelled], values: Any, where: str) -> Labelled:
    """Build what is called by its own name unless it has a label."""
    named = {"label": where.partition(".")[2], **values} if isinstance(values, Mapping) else values
    return build(kind, named, f"{where}.")


def _dataset(values: Any, where: str) -> Dataset:
    tests = values.get("tests", {}) if isinstance(values, Mapping) else {}
    if not isinstance(tests, Mapping) or not all(isinstance(one, str) for one in tests.values()):
        raise UserError(f"{where}.tests is {tests!r}; it takes names of data sets by what tables call them.")
    if tests:
        values = {key: value for key, value in values.items() if key != "tests"}
    return replace(_labelled(Dataset, values, where), tests=dict(tests))


def _experiment(values: Any, where: str, all_arms: tuple[str, ...], corpus: int) -> Experiment:
    published = values.get("published") if isinstance(values, Mapping) else None
    if published is not None:
        if not isinstance(published, Mapping) or set(published) != {"source", "values"}:
            raise UserError(f"{where}.published takes the keys source and values.")
        if not isinstance(published["values"], Mapping):
            raise UserError(f"{where}.published.values is {published['values']!r}; it takes a list of numbers per arm.")
        published = Published(source=str(published["source"]), values=dict(published["values"]))
        values = {key: value for key, value in values.items() if key != "published"}
    defaults = {"title": where.partition(".")[2], "corpus": corpus}
    named = {**defaults, **values} if isinstance(values, Mapping) else values
    experiment = build(Experiment, named, f"{where}.")
    arms = experiment.arms or all_arms
    rows = experiment.datasets if experiment.down == "datasets" else arms
    compare = experiment.compare or tuple((one, rows[0]) for one in rows[1:])
    return replace(experiment, arms=arms, compare=compare, published=published)


def _check(study: Study) -> None:
    """Refuse what could only fail later."""
    for name in (study.name, *study.arms, *study.datasets, *study.experiments, *study.synthetic):
        if not _NAME.fullmatch(name):
            raise UserError(f"'{name}' becomes part of file names: use letters, digits, _, + and -.")
    for name, dataset in study.datasets.items():
        if dataset.preset not in (*PRESETS, CLASSES):
            raise UserError(f"datasets.{name}.preset is '{dataset.preset}'; it can be {', '.join(PRESETS)}, {CLASSES}.")
        for part, test in dataset.tests.items():
            if test not in study.datasets:
                raise UserError(f"datasets.{name}.tests speaks of '{test}', which is none of the datasets.")
            if not _NAME.fullmatch(part) or part in ("test", "validation"):
                raise UserError(f"datasets.{name}.tests.{part} names a folder: use letters, digits, _, + and -.")
    for name, arm in study.arms.items():
        if arm.recipe is not None and arm.checkpoint is not None:
            raise UserError(
                f"arms.{name} has a recipe and a checkpoint: its encoder is either pre-trained here or there."
            )
        if arm.pretraining and arm.recipe is None:
            raise UserError(f"arms.{name} has settings of a pre-training and no recipe.")
        if pretraining := study.pretraining_of(name, seed=0):
            try:
                load_config(pretraining.recipe, list(pretraining.settings))
            except UserError as error:
                raise UserError(f"arms.{name} cannot be pre-trained: {error}") from error
    for name, experiment in study.experiments.items():
        _check_experiment(study, f"experiments.{name}", experiment)
    named: dict[str, AnyRun] = {}
    folders: dict[tuple[Any, ...], Run] = {}
    for run in study.runs():
        if named.setdefault(run.id, run) != run:
            raise UserError(
                f"Two different runs would keep their results as {run.id}. Call arms, data sets or makings otherwise, "
                "or measure with options that differ in more than signs."
            )
        if isinstance(run, Run):
            arm = study.arms[run.arm]
            owner = run.arm if arm.checkpoint or arm.recipe else None
            folder = (study.datasets[run.dataset].id, arm.trainer, run.suffix, run.fold, owner)
            other = folders.setdefault(folder, run)
            if other != run:
                raise UserError(
                    f"{other.id} and {run.id} have one trainer and equal settings, so nnU-Net would keep them in one "
                    "folder. Give the arms different settings, or their checkpoints."
                )


def _check_experiment(study: Study, where: str, experiment: Experiment) -> None:
    segmentation = experiment.kind == "segmentation"
    for key in ("datasets", "fractions", "folds", "seeds", "metrics") if segmentation else ("seeds",):
        if not getattr(experiment, key):
            raise UserError(f"{where}.{key} must name at least one.")
    compared = [one for pair in experiment.compare for one in pair]
    rows: Mapping[str, Any] = study.datasets if experiment.down == "datasets" else study.arms
    published = experiment.published.values if experiment.published else {}
    for kind, names, known in (
        ("arms", [*experiment.arms, *published], study.arms),
        (experiment.down, compared, rows),
        ("datasets", experiment.datasets, study.datasets),
        ("metrics", experiment.metrics if segmentation else (), METRICS),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"{where} speaks of '{unknown[0]}', which is none of the {kind}: {', '.join(known)}.")
    if experiment.kind in ("pretraining", "gradients"):
        for name in experiment.arms:
            if study.arms[name].recipe is None:
                raise UserError(f"{where} reads what pre-trainings recorded, and arms.{name} has no recipe.")
    if published and experiment.down == "datasets":
        raise UserError(f"{where}.published stands beside arms, which go across here.")
    length = 2 if experiment.kind == "alignment" else len(experiment.columns)
    for arm, numbers in published.items():
        if not isinstance(numbers, list) or len(numbers) != length or not all(map(_is_number, numbers)):
            raise UserError(f"{where}.published.values.{arm} must be a list of {length} numbers.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
