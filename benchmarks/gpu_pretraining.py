"""Checks of gpu_check.py that pre-train."""

from __future__ import annotations

import pandas as pd
import torch
from gpu_measures import Finding, Place
from recipes import CORPUS, lay_out

from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.loop import pretrain
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.optimization import build_optimizer, schedules
from nnunet_ssl.pretraining.step import training_step
from nnunet_ssl.pretraining.views.streams import Stream
from nnunet_ssl.weights.encoders import read_checkpoint

FEW = 4  # steps


def corpus_is_there(place: Place) -> Finding:
    lay_out(place.work, subjects=6, voxel_mm=4.0 if place.device.type == "cpu" else 2.5)
    scans = len(open_corpus(CORPUS).scans)
    return Finding(scans > 0, f"{scans} scans")


def recipe_learns(place: Place, recipe: str, backbone: str) -> Finding:
    """A few steps: at the first the queue may hold no negative, and residual blocks begin as identities."""
    config = place.config(recipe, backbone)
    learner = Learner(config, place.device)
    optimizer = build_optimizer(learner.query, config)
    stream = Stream(open_corpus(CORPUS), config, device=place.device, start=0, workers=0)
    trained = {name: one for name, one in learner.query.named_parameters() if one.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    updates = [
        training_step(learner, optimizer, stream, schedules(step, config), measured=step == 1) for step in range(FEW)
    ]
    finite = all(update.finite for update in updates)
    finite = finite and all(bool(parameter.isfinite().all()) for parameter in trained.values())
    still = [name for name, parameter in trained.items() if torch.equal(parameter, before[name])]
    text = f"{'' if finite else 'not '}finite, {len(trained) - len(still)} of {len(trained)} tensors moved"
    if still:
        text += f"; at rest: {', '.join(still[:3])}"
    return Finding(finite and not still, text)


def run_goes_on(place: Place) -> Finding:
    """The loop on a small network, with a process that reads, checkpoints, validation, and a second start."""
    for steps in (2, 4):
        settings = [f"steps={steps}", "workers=1", "recipe=gpu_check", "validation={fraction: 0.3, batches: 1}"]
        settings += ["compile=auto"]  # a user's default
        config = place.config("mcl_mim", "swin", *settings, "log_every=1", small=True)
        pretrain_here(config, place, resume=steps > 2)
    folder = folder_of("nnUNet_results") / CORPUS / "gpu_check"
    losses = pd.read_csv(folder / "progress.csv").set_index("step")["loss/masked"].drop(0)
    pretrained = read_checkpoint(folder / "encoder.safetensors")
    text = f"encoder of step {pretrained.step}, masked losses {', '.join(f'{loss:.3f}' for loss in losses)}"
    return Finding(pretrained.step == 4 and list(losses.index) == [1, 2, 3, 4] and bool(losses.notna().all()), text)


def shortage_is_explained(place: Place) -> Finding:
    """The paper's network in half a GiB more than is taken already."""
    if place.device.type != "cuda":
        return Finding(None, "needs a GPU, whose memory can be limited")
    config = place.config("mcl_mim", "swin", "batch_size=8", "recipe=shortage", "validation.fraction=0.3")
    memory = torch.cuda.get_device_properties(place.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / memory)
    try:
        pretrain_here(config, place, resume=False)
    except UserError as error:
        return Finding("does not fit" in str(error) and "accumulation=2" in str(error), f"'{error}'")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return Finding(False, "the training fitted into half a GiB")


def pretrain_here(config: PretrainingConfig, place: Place, *, resume: bool) -> None:
    """Pre-train in this process, and take back the choice of kernels that the loop makes for its own."""
    try:
        pretrain(config, CORPUS, resume, place.device)
    finally:
        torch.backends.cudnn.benchmark = False
