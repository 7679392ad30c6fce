"""The training loop, from a prepared corpus to a finished encoder. It reads from top to bottom."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from nnunet_ssl.corpus.prepared import Corpus, describe_corpus, open_corpus
from nnunet_ssl.errors import UserError, require
from nnunet_ssl.files import written_beside
from nnunet_ssl.live import live_line
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.interruption import stop_requests
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.monitoring import Validation
from nnunet_ssl.pretraining.optimization import build_optimizer, schedules, set_learning_rate
from nnunet_ssl.pretraining.run import checkpointing, outputs
from nnunet_ssl.pretraining.run.records import Records
from nnunet_ssl.pretraining.run.speed import Stopwatch
from nnunet_ssl.pretraining.run.summary import write_summary
from nnunet_ssl.pretraining.step import training_step
from nnunet_ssl.pretraining.views.loading import lost_workers_explained
from nnunet_ssl.pretraining.views.streams import Stream
from nnunet_ssl.weights.pretrained import ENCODER

logger = logging.getLogger(__name__)


def pretrain(config: PretrainingConfig, dataset: int | str, resume: bool, device: torch.device) -> None:
    """Pre-train on `device`; with several processes, each of them does this.

    Args:
        config: the recipe.
        dataset: id or name of a prepared corpus.
        resume: continue the run in the results folder, if there is one.
        device: of this process.

    Raises:
        UserError: the corpus does not serve the recipe, the results folder cannot be used or another process is at
            work on it, its checkpoint is of another architecture, split or preprocessing, or not the same for all
            processes, the GPU's memory is too small, a reading process died, or the loss was not finite for
            `max_nonfinite` steps in a row.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes, so one choice of kernels serves all
    corpus = open_corpus(dataset)
    folder = outputs.results_folder(corpus.folder.parent.name, config.recipe)
    training, held_out = corpus.split(config.validation.fraction, config.seed)
    with ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(outputs.held(folder))
        if not resume:
            outputs.refuse_to_overwrite(folder)
        stack.enter_context(lost_workers_explained())
        stack.enter_context(shortage_explained(config, device))
        learner = Learner(config, device)
        optimizer = build_optimizer(learner.query, config)
        first, skipped = (outputs.restore(folder, learner, optimizer, corpus) if resume else None) or (0, 0)
        require(
            distributed.same_everywhere(first, int(outputs.roster(corpus)[:15], 16), device=device),
            "The processes do not see the same checkpoint or the same corpus: nnUNet_results and nnUNet_preprocessed "
            "must be the same folders on all machines",
        )
        if first >= config.steps:
            logger.info("%s is finished: %d of %d steps are done.", folder, first, config.steps)
            if not (folder / ENCODER).is_file():
                finish(folder, learner, corpus, step=first)
            return
        if distributed.is_main():
            outputs.write_settings(folder, config)
        stream = Stream(training, config, device=device, start=first, workers=config.workers)
        validation = Validation(held_out, config, device)
        suspects: list[dict[str, Any]] = []  # the last steps in a row that were not finite

        records = stack.enter_context(Records(folder, step=first, config=config, device=device))
        stop_requested = stack.enter_context(stop_requests())
        stopwatch = Stopwatch(stream)
        on_terminal = sys.stderr.isatty() and distributed.is_main()  # elsewhere the log tells the same
        line = stack.enter_context(
            live_line("Pre-training", config.steps, unit="step", done=first, smoothing=0.05, shown=on_terminal)
        )
        announce(folder, corpus, config, learner, first)
        if distributed.is_main():
            outputs.reopen(folder)
        if first == 0:
            records.write(0, validation.measure(learner, schedules(0, config), records, step=0))

        for step in range(first, config.steps):
            schedule = schedules(step, config)
            set_learning_rate(optimizer, schedule["learning_rate"])
            update = training_step(
                learner,
                optimizer,
                stream,
                schedule,
                measured=step % config.gradients_every == 0,
                stop_requested=stop_requested,
            )
            stopwatch.step()
            line.update()

            if update.finite:
                suspects = []
                records.add(*update.figures)
            else:
                skipped += 1
                suspects.append({"step": step, "scans": update.scans})
                logger.warning("Step %d: the loss or its gradient is not finite; the step is skipped.", step)
                if len(suspects) == config.max_nonfinite:
                    give_up(folder, suspects)

            done, last = step + 1, step + 1 == config.steps
            validating = last or done % config.validation.every == 0
            if validating or done % config.log_every == 0:
                figures = {f"schedule/{name}": value for name, value in schedule.items()}
                figures |= {"nonfinite_steps": skipped, **stopwatch.figures(steps_left=config.steps - done)}
                with stopwatch.paused():
                    if validating:
                        figures |= validation.measure(learner, schedule, records, step=done)
                    if distributed.is_main():
                        for objective in config.objectives:
                            figures |= objective.state_figures(learner.state_of(objective))
                    records.write(done, figures)
            if last or update.stopping or done % config.save_every == 0:
                with stopwatch.paused():
                    save(folder, learner, optimizer, corpus, step=done, skipped=skipped)
                    records.plot()
                    if distributed.is_main():
                        write_summary(folder, config, outputs.description(corpus, config), distributed.world_size())
            if update.stopping and not last:
                logger.info("Asked to stop: step %d is saved. Go on with the same command and --c.", done)
                return
        finish(folder, learner, corpus, step=config.steps)


@contextmanager
def shortage_explained(config: PretrainingConfig, device: torch.device) -> Iterator[None]:
    """Say what to do when the GPU's memory does not suffice.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        raise UserError(
            f"The training does not fit the {memory:.0f} GiB of this device (nvidia-smi tells whether others use it): "
            f"add --set accumulation={2 * config.accumulation}, or more, checkpointing=true, or a smaller patch_size."
        ) from error


def announce(folder: Path, corpus: Corpus, config: PretrainingConfig, learner: Learner, first: int) -> None:
    """Say what is about to happen."""
    parameters = sum(parameter.numel() for parameter in learner.query.encoder.parameters())
    logger.info("Recipe %s on %s:\n%s", config.recipe, corpus.folder.parent.name, describe_corpus(corpus.summary()))
    logger.info("Encoder of %s parameters; %s", f"{parameters:,}", f"{distributed.world_size()} process(es)")
    compiled = "compiled in parts, which makes the first steps slow" if learner.compiles else "not compiled"
    logger.info("The encoder is %s (compile=%s)", compiled, str(config.compile).lower())
    logger.info("Steps %d to %d; results in %s", first, config.steps, folder)


def save(
    folder: Path,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    *,
    step: int,
    skipped: int,
) -> None:
    """Write a checkpoint, on the main process."""
    if distributed.is_main():
        state = outputs.checkpoint_state(learner, optimizer, corpus, step=step, skipped=skipped)
        checkpointing.save(folder, state, step=step, keep=learner.config.keep_checkpoints)


def finish(folder: Path, learner: Learner, corpus: Corpus, *, step: int) -> None:
    """Leave the final checkpoint and the encoder, on the main process."""
    if distributed.is_main():
        outputs.write_final(folder, learner, corpus, step=step)
        logger.info("Finished. The encoder is in %s", folder / ENCODER)


def give_up(folder: Path, suspects: list[dict[str, Any]]) -> None:
    """Write down which scans were in the steps that were not finite, and end the training.

    Raises:
        UserError: always.
    """
    path = folder / f"nonfinite_rank{distributed.rank()}.json"
    with written_beside(path) as temporary:
        temporary.write_text(json.dumps(suspects, indent=1))
    raise UserError(
        f"The loss or its gradient was not finite in {len(suspects)} steps running, up to step {suspects[-1]['step']}; "
        f"their scans are listed in {path}. Look at them, lower learning_rate, or set bf16=false; --c goes on from the "
        "last checkpoint."
    )
