"""A study: the runs that a YAML file asks for. Nothing is executed or looked up here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from nnunet_ssl.trainers.settings import Settings

CLASSES = "classes"
"""The preset of a data set whose labels are no lesions."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is compared: a pre-training, or an encoder that is there, and how it is fine-tuned.

    Attributes:
        label: its name in tables.
        trainer: nnU-Net trainer class; one of another package takes no settings.
        recipe: what the study pre-trains for it, once for every seed (``nnssl_pretrain -c``).
        pretraining: settings of that pre-training, as its ``--set`` takes them, on top of the study's.
        checkpoint: what ``nnssl_checkpoint`` names for its trainings, also published weights (openmind-mae).
            Without recipe and checkpoint, the trainer chooses: the newest finished pre-training of its recipe.
        settings: of fine-tuning, on top of the study's; null takes none of those either, as plain nnU-Net must.
    """

    label: str
    trainer: str = "nnUNetTrainerSSL"
    recipe: str | None = None
    pretraining: str = ""
    checkpoint: str | None = None
    settings: str | None = ""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An nnU-Net data set, which is one modality or a fixed set of them.

    Attributes:
        label: its name in tables.
        id: nnU-Net's number.
        preset: how its lesions are evaluated (``nnssl_evaluate lesions --preset``); "classes": the Dice of every label
            by nnU-Net's own evaluation, for what is no lesion.
        tests: data sets on whose ``imagesTr`` and ``labelsTr`` its models are tried as well, by what tables call the
            column: other subjects, or another modality.
    """

    label: str
    id: int
    preset: str = "isles"
    tests: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """What a training is evaluated on: its fold, the data set's own labelled test set if it has one, its tests."""
        return ["test", "validation", *self.tests]


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
        kind: "segmentation" fine-tunes and evaluates; "alignment", "probe" and "finetune" measure the arms' encoders by
            ``nnssl_evaluate``; "pretraining" and "gradients" read what the arms' pre-trainings recorded.
        arms: all by default.
        datasets: needed by a segmentation.
        fractions: per cent of the training subjects.
        folds: of nnU-Net's cross-validation.
        seeds: of the subset of training subjects, of what is initialised at random, and of the study's pre-trainings.
        metrics: the first is tested and drawn. Of a pre-training: columns of its progress.csv, whose last values count.
        compare: pairs that are tested against each other, of arms, or of data sets if those go `down`; by default each
            against the first.
        down: what the rows of a segmentation's table are; the other goes across.
        corpus: data set of whatever measures encoders; by default the study's.
        subjects: of an alignment, "all" or "validation".
        options: further ones of ``nnssl_evaluate``, such as ``--target age``.
        published: figures of others, of the first metric; of an alignment, mean and standard deviation.
    """

    title: str
    kind: Literal["segmentation", "alignment", "probe", "finetune", "pretraining", "gradients"] = "segmentation"
    arms: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    fractions: tuple[int, ...] = (100,)
    folds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    metrics: tuple[str, ...] = ("dice", "lesion_f1")
    compare: tuple[tuple[str, str], ...] = ()
    down: Literal["arms", "datasets"] = "arms"
    corpus: int = 500
    subjects: Literal["all", "validation"] = "validation"
    options: str = ""
    published: Published | None = None

    @property
    def columns(self) -> list[tuple[str, int]]:
        """(data set, fraction), in the order of the table."""
        return [(dataset, fraction) for dataset in self.datasets for fraction in self.fractions]


@dataclass(frozen=True, kw_only=True)
class Making:
    """The commands that make one of a study's own synthetic data sets."""

    name: str
    commands: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"make__{self.name}"


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """One pre-training; arms that ask for the same share it."""

    arm: str  # the first that asks for it
    recipe: str
    corpus: int
    seed: int
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the folder of its results."""
        return f"{self.arm}_seed{self.seed}"

    @property
    def id(self) -> str:
        return f"pretrain__{self.name}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """All that ``--set`` is given."""
        return (f"recipe={self.name}", f"seed={self.seed}", *self.settings)


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
class Measurement:
    """One measurement of an arm's encoder by ``nnssl_evaluate``."""

    name: str  # of what is measured, alike for all arms and seeds
    kind: str
    arm: str
    corpus: int
    options: str
    seed: int = 0

    @property
    def id(self) -> str:
        return f"{self.name}__{self.arm}" + f"__seed{self.seed}" * (self.seed != 0)


AnyRun: TypeAlias = Making | Pretraining | Run | Measurement


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole YAML file; see ``studies/shipped/paper.yaml`` for one with comments.

    Attributes:
        settings: of every fine-tuning, as ``nnssl_settings`` takes them.
        pretraining: settings of every pre-training of the study, as ``nnssl_pretrain --set`` takes them.
        prediction: further options of ``nnUNetv2_predict``.
        corpus: data set of the study's pre-trainings.
        voxel_mm: of synthetic data, which their commands call ``$voxel_mm``.
        synthetic: commands by the data set that they make, one after another. nnU-Net's folders, ``$nnUNet_raw`` and
            the others, are then within the study's own, and ``$work`` is another one there.
    """

    name: str
    configuration: str = "3d_fullres"
    plans: str = "nnUNetPlans"
    settings: str = ""
    pretraining: str = ""
    prediction: str = ""
    corpus: int = 500
    voxel_mm: float = 4.0
    synthetic: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    experiments: dict[str, Experiment] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)

    @property
    def makings(self) -> list[Making]:
        """What makes the study's own data, one after another: later ones may need what earlier ones made."""
        return [Making(name=name, commands=commands) for name, commands in self.synthetic.items()]

    def runs(self) -> list[AnyRun]:
        """Every run once, though experiments may share it: data, then pre-trainings; first folds and seeds first."""
        listed = [(place, run) for experiment in self.experiments.values() for place, run in self._runs_of(experiment)]
        ordered = [run for _, run in sorted(listed, key=lambda item: (item[0], not isinstance(item[1], Pretraining)))]
        return [*self.makings, *dict.fromkeys(ordered)]

    def runs_of(self, experiment: Experiment) -> list[AnyRun]:
        """The runs of one experiment, shared ones included."""
        return [run for _, run in self._runs_of(experiment)]

    def pretraining_of(self, arm: str, seed: int) -> Pretraining | None:
        """The pre-training of an arm, if the study has one for it."""
        recipe = self.arms[arm].recipe
        if recipe is None:
            return None
        wanted = _pretraining_settings(self, arm)
        first = next(
            name
            for name, other in self.arms.items()
            if other.recipe == recipe and _pretraining_settings(self, name) == wanted
        )
        return Pretraining(arm=first, recipe=recipe, corpus=self.corpus, seed=seed, settings=wanted)

    def _runs_of(self, experiment: Experiment) -> Iterator[tuple[int, AnyRun]]:
        """With each run, how many folds and seeds of its table come before."""
        for place, seed in enumerate(experiment.seeds):
            for arm in experiment.arms:
                if pretraining := self.pretraining_of(arm, seed):
                    yield place * len(experiment.folds), pretraining
        if experiment.kind == "segmentation":
            yield from self._trainings_of(experiment)
        elif experiment.kind in ("alignment", "probe", "finetune"):
            yield from self._measurements_of(experiment)

    def _measurements_of(self, experiment: Experiment) -> Iterator[tuple[int, Measurement]]:
        words, options = re.findall(r"\w+", experiment.options), experiment.options
        if experiment.kind == "alignment":
            name = "_".join([f"alignment__{experiment.corpus}", experiment.subjects, *words])
            options = f"--subjects {experiment.subjects} {options}".strip()
        else:
            elsewhere = [str(experiment.corpus)] if experiment.corpus != self.corpus else []
            name = "_".join([experiment.kind, *elsewhere, *words])
        for place, seed in enumerate(experiment.seeds):
            for arm in experiment.arms:
                if place and not self._repeats(experiment.kind, arm):
                    continue
                yield (
                    place,
                    Measurement(
                        name=name, kind=experiment.kind, arm=arm, corpus=experiment.corpus, options=options, seed=seed
                    ),
                )

    def _repeats(self, kind: str, arm: str) -> bool:
        """Whether another seed measures anything else: of one encoder that is only looked at, it would be a copy, and
        its figures would seem certain."""
        return kind == "finetune" or self.arms[arm].recipe is not None

    def _trainings_of(self, experiment: Experiment) -> Iterator[tuple[int, Run]]:
        repeats = [(seed, fold) for seed in experiment.seeds for fold in experiment.folds]
        for place, (seed, fold) in enumerate(repeats):
            for dataset, fraction in experiment.columns:
                for arm in experiment.arms:
                    own = self.arms[arm].settings
                    settings = _joined(
                        self.settings if own is not None else "",
                        own or "",
                        f"fraction={fraction}" * (fraction != 100),
                        f"seed={seed}" * (seed != 0),
                    )
                    yield (
                        place,
                        Run(arm=arm, dataset=dataset, fraction=fraction, fold=fold, seed=seed, settings=settings),
                    )


def _pretraining_settings(study: Study, arm: str) -> tuple[str, ...]:
    """As ``--set`` takes them, one word each; of two values for one key the later holds."""
    words = f"{study.pretraining} {study.arms[arm].pretraining}".split()
    return tuple({word.partition("=")[0]: word for word in words}.values())


def _joined(*settings: str) -> str:
    """Put settings together; of two values for one key the later holds."""
    items = [item.strip() for text in settings for item in text.split(",") if item.strip()]
    return ",".join({item.partition("=")[0].strip(): item for item in items}.values())
