"""Where a run's figures go: a line per interval in the log, a CSV, TensorBoard, progress.png, and W&B on request."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.run.plotting import progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

LOG, CSV, PLOT = "training_log.txt", "progress.csv", "progress.png"

IN_THE_LOG = {
    "gradient/total": "gradient {:.2f}",
    "schedule/learning_rate": "lr {:.1e}",
    "speed/steps_per_second": "{:.2f} steps/s",
    "speed/waiting": "waiting {:.0%}",
    "speed/hours_left": "{:.1f} h left",
    "validation/cross_modality_distance": "cross-modality {:.4f}",
    "validation/cross_subject_distance": "cross-subject {:.4f}",
}

logger = logging.getLogger(__name__)


class Records:
    """Averages figures over an interval and over ranks; the main process writes them down. A context manager.

    Args:
        folder: of the run.
        step: steps done before; rows of later steps, from a run that died after its last checkpoint, are dropped.
        config: what is being run.
        device: of this process, where ranks exchange their figures.
    """

    def __init__(self, folder: Path, *, step: int, config: PretrainingConfig, device: torch.device) -> None:
        self.folder = folder
        self.steps = config.steps
        self.formats = {name: text for one in config.objectives for name, text in one.in_the_log.items()} | IN_THE_LOG
        self.device = device
        self.rows = _earlier_rows(folder / CSV, step)
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._sinks = _open_sinks(folder, step, config) if distributed.is_main() else None
        if self._sinks is not None and self.rows:
            self._write_table()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sinks is not None:
            self._sinks.close()

    def add(self, *dictionaries: Mapping[str, Tensor | float]) -> None:
        """Take figures of one step into the interval's means. Tensors stay on their device until they are written."""
        for figures in dictionaries:
            for name, value in figures.items():
                self._sums[name] = self._sums[name] + value
                self._counts[name] += 1

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the interval's means, and `figures`, as the row of `step`; begin a new interval. All ranks do so."""
        row = {"step": step, **self._means(), **figures}
        self._sums.clear()
        self._counts.clear()
        if self._sinks is None:
            return
        self.rows.append(row)
        self._write_table()
        self._sinks.write(step, row)
        shown = ", ".join(form.format(row[name]) for name, form in self.formats.items() if name in row)
        logger.info("%s step %d: %s", time.strftime("%Y-%m-%d %H:%M:%S"), step, shown)

    def _write_table(self) -> None:
        with written_beside(self.folder / CSV) as temporary:
            self._table().to_csv(temporary, index=False)

    def _table(self) -> pd.DataFrame:
        table = pd.DataFrame(self.rows)
        return table[["step", *sorted(table.columns.drop("step"))]]

    def _means(self) -> dict[str, float]:
        """The mean of each figure over the interval and over ranks, in one exchange and one wait for the device."""
        if not self._sums:
            return {}
        means = [torch.as_tensor(total, device=self.device) / self._counts[name] for name, total in self._sums.items()]
        table = torch.stack([mean.float() for mean in means])
        distributed.average_([table])
        return dict(zip(self._sums, table.tolist()))

    def plot(self) -> None:
        """Draw progress.png anew."""
        if self._sinks is None or not self.rows:
            return
        title = f"{self.folder.name}, step {self.rows[-1]['step']:,} of {self.steps:,}"
        with written_beside(self.folder / PLOT) as temporary:
            progress(self._table(), title).savefig(temporary, dpi=100)

    def picture(self, name: str, figure: Figure, step: int) -> None:
        """Show a figure in TensorBoard, and keep the latest as a PNG."""
        if self._sinks is None:
            return
        with written_beside(self.folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=100)
        self._sinks.tensorboard.add_figure(name, figure, step)


@dataclass(frozen=True)
class _Sinks:
    """Where rows go besides the CSV."""

    log: logging.Handler
    tensorboard: SummaryWriter
    others: list[Any]  # loggers of nnU-Net

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, step)
            for other in self.others:
                other.log(name, value, step)
        self.tensorboard.flush()

    def close(self) -> None:
        self.tensorboard.close()
        logging.getLogger("nnunet_ssl").removeHandler(self.log)
        self.log.close()


def _open_sinks(folder: Path, step: int, config: PretrainingConfig) -> _Sinks:
    from nnunetv2.training.logging.nnunet_logger import MetaLogger
    from torch.utils.tensorboard import SummaryWriter

    try:
        nnunet = MetaLogger(folder, resume=step > 0)  # W&B, when nnU-Net's own switch nnUNet_wandb_enabled=1 is on
    except RuntimeError as error:
        raise UserError(f"nnU-Net's logger cannot start: {error}") from error
    nnunet.update_config(config.as_dict())
    log = logging.FileHandler(folder / LOG)
    log.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("nnunet_ssl")
    package.setLevel(logging.INFO)
    package.addHandler(log)
    return _Sinks(log, SummaryWriter(str(folder / "events"), purge_step=step), nnunet.loggers)


def _earlier_rows(path: Path, step: int) -> list[dict[str, float]]:
    if step == 0 or not path.is_file():
        return []
    table = pd.read_csv(path)
    rows = [row.dropna().to_dict() for _, row in table[table["step"] <= step].iterrows()]
    return [{**row, "step": int(row["step"])} for row in rows]
