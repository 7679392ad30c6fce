"""The console command ``nnssl_study``: run an experiment's whole matrix, see how it stands, collect its tables."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeAlias

from nnunet_ssl.console import OptionParser, command
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.studies.running import State
    from nnunet_ssl.studies.study import AnyRun, Experiment, Study

    States: TypeAlias = dict[AnyRun, State]

logger = logging.getLogger(__name__)

_EXAMPLE = """\
examples:
  nnssl_study status paper                        the paper's three first experiments: what is there, what is missing
  nnssl_study run paper                           do what is missing, one run after another
  CUDA_VISIBLE_DEVICES=1 nnssl_study run paper    a second runner shares the work
  nnssl_study run paper --executor slurm          one job per run, with the YAML's slurm options
  nnssl_study run recipes --dry_run               settings of fine-tuning against each other: only print the commands
  nnssl_study run gradients -device cpu           from synthetic brains of its own, pre-trainings included
  nnssl_study run gradients --full                the same question at full size, on your prepared corpus
  nnssl_study collect paper                       tables beside the published ones, tests, figures

It may be interrupted at any time; the same call goes on where it stopped, and tries failed runs again.
Exit status of run: 0 nothing is missing that nobody works on (slurm: all submitted); 1 runs failed or wait for data.
"""

MARKS = {"running": "r", "queued": "q", "failed": "F", "waiting": "w", "outdated": "o"}


@command
def study() -> None:
    parser = OptionParser(
        prog="nnssl_study",
        description="Run a study: arms x data sets x fractions x folds x seeds, named in a YAML file.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("action", choices=("run", "status", "collect"))
    parser.add_argument(
        "study",
        metavar="STUDY",
        help="a YAML file, or one that comes with the package: gradients, missing, paper, pathology, published, "
        "raters, recipes, tasks, tokens",
    )
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="(default: $nnUNet_results/studies/<its name>)")
    parser.add_argument(
        "--full", action="store_true", help="at the size that the file names under 'full', on data of your own"
    )
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="(default: cuda)")
    parser.add_argument("--executor", choices=("local", "slurm"), default="local", help="(default: local)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of what is missing, do nothing")
    arguments = parser.parse_args()
    {"run": _run, "status": _status, "collect": _collect}[arguments.action](arguments)


def _open(arguments: argparse.Namespace) -> tuple[Study, Path, States]:
    """Read the study, its folder and how its runs stand."""
    from nnunet_ssl.commands import KEPT_MEMORY, SHARED_CORES
    from nnunet_ssl.nnunet_folders import folder_of
    from nnunet_ssl.studies.changes import refuse_changes
    from nnunet_ssl.studies.places import own_nnunet_folders
    from nnunet_ssl.studies.running import state_of
    from nnunet_ssl.studies.slurm import queued_jobs
    from nnunet_ssl.studies.study_file import read_study
    from nnunet_ssl.trainers import checkpoints, settings

    for name in (settings.VARIABLE, checkpoints.VARIABLE):
        if os.environ.pop(name, None) is not None:
            logger.warning("%s is set here and not used: a study names settings and checkpoints itself.", name)
    if arguments.device == "cpu":
        for name, value in (KEPT_MEMORY | SHARED_CORES).items():
            os.environ.setdefault(name, value)
    study = read_study(arguments.study, full=arguments.full)
    folder = (arguments.o or folder_of("nnUNet_results") / "studies" / study.name).absolute()
    if study.synthetic:
        os.environ.update(own_nnunet_folders(folder))
    refuse_changes(study, folder)
    queue = queued_jobs()
    states = {run: state_of(run, study, folder, arguments.device, queue) for run in study.runs()}
    return study, folder, states


def _run(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.studies.places import own_nnunet_folders
    from nnunet_ssl.studies.running import execute_all, state_of

    study, folder, states = _open(arguments)
    logger.info("%s: %s; in %s", study.name, _counted(states), folder)
    todo = [run for run, state in states.items() if state.kind in ("missing", "outdated", "failed")]
    if arguments.dry_run:
        _print_commands(todo, study, folder, arguments.device)
        return
    if study.synthetic:
        for path in own_nnunet_folders(folder).values():
            Path(path).mkdir(parents=True, exist_ok=True)
    if arguments.executor == "local":
        todo += [run for run, state in states.items() if state.kind == "waiting"]
    if arguments.executor == "slurm" and todo:
        from nnunet_ssl.studies.slurm import submit

        jobs = submit(todo, study, folder, arguments.device)
        logger.info("Submitted %d jobs, %s to %s. See: nnssl_study status %s", len(jobs), jobs[0], jobs[-1], study.name)
    else:
        signal.signal(signal.SIGTERM, _interrupt)
        failed = execute_all(todo, study, folder, arguments.device)
        if failed:
            raise UserError(f"{len(failed)} runs failed: {', '.join(failed)}. Their logs are in {folder / 'logs'}.")
    states = {run: state_of(run, study, folder, arguments.device) for run in states}
    if waiting := sum(state.kind == "waiting" for state in states.values()):
        _explain(states, "waiting")
        raise UserError(f"{waiting} runs wait for what is said above; then call this again.")
    dropped = [run.id for run, state in states.items() if state.kind in ("missing", "outdated")]
    if dropped and arguments.executor == "local":
        raise UserError(f"Another runner began and did not finish {', '.join(dropped)}. Call this again.")
    same = (f"-o {shlex.quote(str(arguments.o))}" if arguments.o else "", "--full" if arguments.full else "")
    collect = " ".join(["nnssl_study collect", shlex.quote(arguments.study), *filter(None, same)])
    logger.info("%s: %s. Tables and figures: %s", study.name, _counted(states), collect)


def _status(arguments: argparse.Namespace) -> None:
    study, folder, states = _open(arguments)
    logger.info("%s in %s", study.name, folder)
    logger.info("%s", _counted(states))
    for name, experiment in study.experiments.items():
        logger.info("\n%s: %s\n%s", name, experiment.title, _matrix(study, experiment, states))
    logger.info(
        "\nfinished/all; r running, q queued, F failed, w waiting for data or a pre-training, "
        "o of what the study was before\n"
    )
    for kind in ("failed", "waiting"):
        _explain(states, kind)


def _collect(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.studies.report import collect

    study, folder, states = _open(arguments)
    if outdated := [run.id for run, state in states.items() if state.kind == "outdated"]:
        raise UserError(
            f"The results of {len(outdated)} runs are of what the study was before: {', '.join(outdated)}. "
            "nnssl_study run makes them anew."
        )
    finished = sum(state.kind == "finished" for state in states.values())
    path = collect(study, folder)
    logger.info("%s", path.read_text())
    logger.info("%d of %d runs are finished. Written to %s", finished, len(states), path.parent)


def _print_commands(runs: Sequence[AnyRun], study: Study, folder: Path, device: str) -> None:
    from nnunet_ssl.studies.stages import stages_of

    for run in runs:
        logger.info("\n# %s", run.id)
        for stage in stages_of(run, study, folder, device):
            if not stage.is_done():
                variables = [f"{name}={shlex.quote(value)}" for name, value in stage.variables.items() if value]
                logger.info("%s", " ".join([*variables, shlex.join(stage.command)]))


def _matrix(study: Study, experiment: Experiment, states: States) -> str:
    """Arms down, data sets and fractions across: how many runs are finished, of how many, and what the others do."""
    import pandas as pd

    from nnunet_ssl.studies.study import Measurement, Pretraining, Run

    def column(run: AnyRun) -> str:
        match run:
            case Run():
                return study.datasets[run.dataset].label + f" {run.fraction} %" * (len(experiment.fractions) > 1)
            case Measurement():
                return f"Dataset{run.corpus}"
        return "pre-training"

    cells: dict[tuple[str, str], list[str]] = {}
    for run in study.runs_of(experiment):
        if isinstance(run, Run | Measurement | Pretraining):
            cells.setdefault((study.arms[run.arm].label, column(run)), []).append(states[run].kind)
    table = pd.Series({key: _cell(kinds) for key, kinds in cells.items()}).unstack()
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells))
    return table.loc[rows, columns].to_string()


def _cell(kinds: list[str]) -> str:
    marks = "".join(mark for kind, mark in MARKS.items() if kind in kinds)
    return f"{kinds.count('finished')}/{len(kinds)} {marks}".strip()


def _explain(states: States, kind: str) -> None:
    """Say once what several runs have in common."""
    reasons: dict[str, list[str]] = {}
    for run, state in states.items():
        if state.kind == kind:
            reasons.setdefault(state.detail, []).append(run.id)
    for reason, runs in reasons.items():
        others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        logger.info("%s: %s%s: %s", kind, runs[0], others, reason)


def _counted(states: States) -> str:
    counts = Counter(state.kind for state in states.values())
    return f"{len(states)} runs: " + ", ".join(f"{number} {kind}" for kind, number in counts.items())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
