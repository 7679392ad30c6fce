"""A study: the runs that a YAML file asks for. Nothing is executed or looked up here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.lesions import PRESETS
from nnunet_ssl.evaluation.segmentations import METRICS
from nnunet_ssl.trainers.settings import Settings
from nnunet_ssl.typed import build


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is compared.

    Attributes:
        label: its name in tables.
        trainer: nnU-Net trainer class; one of another package takes no settings.
        checkpoint: what ``nnssl_checkpoint`` names for its trainings, also published weights (openmind-mae).
            Without, the trainer chooses: the newest finished pre-training of its recipe.
        settings: on top of the study's.
    """

    label: str
    trainer: str
    checkpoint: str | None = None
    settings: str = ""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An nnU-Net data set, which is one modality or a fixed set of them.

    Attributes:
        label: its name in tables.
        id: nnU-Net's number.
        preset: how its lesions are evaluated (``nnssl_evaluate lesions --preset``).
    """

    label: str
    id: int
    preset: str = "isles"


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of others, shown beside ours: one list per arm, in the order of the experiment's columns."""

    source: str
    values: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table: arms down, data sets and fractions across.

    Attributes:
        title: of the table.
        kind: "segmentation" fine-tunes and evaluates; "alignment" measures the arms' pre-trainings.
        arms: all by default.
        datasets: needed by a segmentation.
        fractions: per cent of the training subjects.
        folds: of nnU-Net's cross-validation.
        seeds: of the subset of training subjects and of what is initialised at random.
        metrics: the first is tested and drawn.
        compare: pairs of arms that are tested against each other; by default each arm against the first.
        corpus: data set of an alignment.
        subjects: of an alignment, "all" or "validation".
        published: figures of others, of the first metric; of an alignment, mean and standard deviation.
    """

    title: str
    kind: Literal["segmentation", "alignment"] = "segmentation"
    arms: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    fractions: tuple[int, ...] = (100,)
    folds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    metrics: tuple[str, ...] = ("dice", "lesion_f1")
    compare: tuple[tuple[str, str], ...] = ()
    corpus: int = 500
    subjects: Literal["all", "validation"] = "validation"
    published: Published | None = None

    @property
    def columns(self) -> list[tuple[str, int]]:
        """(data set, fraction), in the order of the table."""
        return [(dataset, fraction) for dataset in self.datasets for fraction in self.fractions]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning with its evaluation."""

    arm: str
    dataset: str
    fraction: int
    fold: int
    seed: int
    settings: str  # all of nnssl_settings

    @property
    def id(self) -> str:
        return f"{self.dataset}__{self.arm}__fraction{self.fraction}__seed{self.seed}__fold{self.fold}"

    @property
    def suffix(self) -> str:
        """What the settings add to the name of plans that have none."""
        return Settings().updated(self.settings).suffix()


@dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """One measurement of a pre-training's alignment."""

    arm: str
    corpus: int
    subjects: str

    @property
    def id(self) -> str:
        return f"alignment__{self.corpus}_{self.subjects}__{self.arm}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole YAML file; see ``studies/paper.yaml`` for one with comments."""

    name: str
    configuration: str = "3d_fullres"
    plans: str = "nnUNetPlans"
    settings: str = ""
    arms: dict[str, Arm] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    experiments: dict[str, Experiment] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)

    def runs(self) -> list[Run | AlignmentRun]:
        """Every run once, though experiments may share it; first folds and first seeds come first."""
        listed = [(place, run) for experiment in self.experiments.values() for place, run in self._runs_of(experiment)]
        return list(dict.fromkeys(run for _, run in sorted(listed, key=lambda item: item[0])))

    def runs_of(self, experiment: Experiment) -> list[Run | AlignmentRun]:
        """The runs of one experiment, shared ones included."""
        return [run for _, run in self._runs_of(experiment)]

    def _runs_of(self, experiment: Experiment) -> Iterator[tuple[int, Run | AlignmentRun]]:
        """With each run, how many folds and seeds of its table come before."""
        if experiment.kind == "alignment":
            for arm in experiment.arms:
                yield 0, AlignmentRun(arm=arm, corpus=experiment.corpus, subjects=experiment.subjects)
            return
        repeats = [(seed, fold) for seed in experiment.seeds for fold in experiment.folds]
        for place, (seed, fold) in enumerate(repeats):
            for dataset, fraction in experiment.columns:
                for arm in experiment.arms:
                    settings = _joined(
                        self.settings,
                        self.arms[arm].settings,
                        f"fraction={fraction}" * (fraction != 100),
                        f"seed={seed}" * (seed != 0),
                    )
                    yield (
                        place,
                        Run(arm=arm, dataset=dataset, fraction=fraction, fold=fold, seed=seed, settings=settings),
                    )


def shipped() -> dict[str, Path]:
    """Return the studies that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(str(resources.files(__package__) / "studies")).glob("*.yaml"))}


def read_study(path_or_name: str) -> Study:
    """Read a study from a YAML file, or one that comes with the package by its name.

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
        return study_from(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def study_from(values: Mapping[str, Any]) -> Study:
    """Build a study from what its YAML holds.

    Raises:
        UserError: an unknown key, a name that is not defined, a value out of range, or two runs in one folder.
    """
    parts = {key: _mapping(values, key) for key in ("arms", "datasets", "experiments")}
    study = replace(
        build(Study, {key: value for key, value in values.items() if key not in (*parts, "slurm")}),
        arms={name: _labelled(Arm, one, f"arms.{name}") for name, one in parts["arms"].items()},
        datasets={name: _labelled(Dataset, one, f"datasets.{name}") for name, one in parts["datasets"].items()},
        experiments={
            name: _experiment(one, f"experiments.{name}", tuple(parts["arms"]))
            for name, one in parts["experiments"].items()
        },
        slurm=dict(_mapping(values, "slurm")) if values.get("slurm") else {},
    )
    _check(study)
    return study


_NAME = re.compile(r"[A-Za-z0-9_+-]+")


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    found = values.get(key)
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"'{key}' must name at least one.")
    return {str(name): one for name, one in found.items()}


Labelled = TypeVar("Labelled", Arm, Dataset)


def _labelled(kind: type[Labelled], values: Any, where: str) -> Labelled:
    """Build what is called by its own name unless it has a label."""
    named = {"label": where.partition(".")[2], **values} if isinstance(values, Mapping) else values
    return build(kind, named, f"{where}.")


def _experiment(values: Any, where: str, all_arms: tuple[str, ...]) -> Experiment:
    published = values.get("published") if isinstance(values, Mapping) else None
    if published is not None:
        if not isinstance(published, Mapping) or set(published) != {"source", "values"}:
            raise UserError(f"{where}.published takes the keys source and values.")
        if not isinstance(published["values"], Mapping):
            raise UserError(f"{where}.published.values is {published['values']!r}; it takes a list of numbers per arm.")
        published = Published(source=str(published["source"]), values=dict(published["values"]))
        values = {key: value for key, value in values.items() if key != "published"}
    named = {"title": where.partition(".")[2], **values} if isinstance(values, Mapping) else values
    experiment = build(Experiment, named, f"{where}.")
    arms = experiment.arms or all_arms
    compare = experiment.compare or tuple((arm, arms[0]) for arm in arms[1:])
    return replace(experiment, arms=arms, compare=compare, published=published)


def _check(study: Study) -> None:
    """Refuse what could only fail later."""
    for name in (study.name, *study.arms, *study.datasets, *study.experiments):
        if not _NAME.fullmatch(name):
            raise UserError(f"'{name}' becomes part of file names: use letters, digits, _, + and -.")
    for name, dataset in study.datasets.items():
        if dataset.preset not in PRESETS:
            raise UserError(f"datasets.{name}.preset is '{dataset.preset}'; it can be {', '.join(PRESETS)}.")
    for name, experiment in study.experiments.items():
        _check_experiment(study, f"experiments.{name}", experiment)
    folders: dict[tuple[Any, ...], Run] = {}
    for run in study.runs():
        if isinstance(run, Run):
            arm = study.arms[run.arm]
            owner = run.arm if arm.checkpoint else None
            folder = (study.datasets[run.dataset].id, arm.trainer, run.suffix, run.fold, owner)
            other = folders.setdefault(folder, run)
            if other != run:
                raise UserError(
                    f"{other.id} and {run.id} have one trainer and equal settings, so nnU-Net would keep them in one "
                    "folder. Give the arms different settings, or their checkpoints."
                )


def _check_experiment(study: Study, where: str, experiment: Experiment) -> None:
    for key in ("datasets", "fractions", "folds", "seeds", "metrics") if experiment.kind == "segmentation" else ():
        if not getattr(experiment, key):
            raise UserError(f"{where}.{key} must name at least one.")
    compared = [arm for pair in experiment.compare for arm in pair]
    published = experiment.published.values if experiment.published else {}
    for kind, names, known in (
        ("arms", [*experiment.arms, *compared, *published], study.arms),
        ("datasets", experiment.datasets, study.datasets),
        ("metrics", experiment.metrics, METRICS),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"{where} speaks of '{unknown[0]}', which is none of the {kind}: {', '.join(known)}.")
    length = 2 if experiment.kind == "alignment" else len(experiment.columns)
    for arm, numbers in published.items():
        if not isinstance(numbers, list) or len(numbers) != length or not all(map(_is_number, numbers)):
            raise UserError(f"{where}.published.values.{arm} must be a list of {length} numbers.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _joined(*settings: str) -> str:
    """Put settings together; of two values for one key the later holds."""
    items = [item.strip() for text in settings for item in text.split(",") if item.strip()]
    return ",".join({item.partition("=")[0].strip(): item for item in items}.values())
