"""Checks of gpu_check.py that run nnU-Net's own commands: plan, train, continue, predict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from gpu_measures import Check, Finding, Place
from torch import Tensor

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.commands import find_program
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.contrast import render
from nnunet_ssl.phantom.lesions import chronic_stroke
from nnunet_ssl.trainers.settings import Settings
from nnunet_ssl.weights.encoders import read_checkpoint, write_encoder

DATASET, CASES, VOXEL_MM = "Dataset501_Strokes", 5, 6.0
TRAINER = "nnUNetTrainerMCLMIM"
STEPS, STEPS_IN_EPOCH = 12, 4
SETTINGS = f"steps={STEPS},epoch_steps={STEPS_IN_EPOCH},freeze_share=0.5,patch_size=32x32x32,batch_size=2"
FIRST_SCALE = 2.0**16  # of torch's GradScaler
PATIENCE = 600  # seconds for one command


def checks(place: Place, backbone: str) -> dict[str, Check]:
    """By name; the first trains, and the others look at what it left."""
    training = Training(place, backbone)
    return {
        "trained, killed, continued": training.run,
        "encoder tensors that moved": partial(training.after, training.encoder_moved),
        "optimizer and GradScaler go on": partial(training.after, training.updates_counted),
        "prediction as on the CPU": partial(training.after, training.predicts_as_the_cpu),
    }


def strokes_are_there(place: Place) -> Finding:
    """Write heads with strokes as nnU-Net's raw data; plan and preprocess them."""
    raw, grid = folder_of("nnUNet_raw") / DATASET, mni_grid(VOXEL_MM)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    for case in range(CASES + 1):
        rng = np.random.default_rng(case)
        anatomy, lesion = chronic_stroke(build_anatomy(draw_person(rng), grid), rng, volume_ml=60)
        image = nibabel.Nifti1Image(render(anatomy, "t1", rng).astype(np.float32), grid.affine)
        nibabel.save(image, raw / ("imagesTr" if case < CASES else "imagesTs") / f"case_{case}_0000.nii.gz")
        if case < CASES:
            nibabel.save(
                nibabel.Nifti1Image(lesion.astype(np.uint8), grid.affine), raw / f"labelsTr/case_{case}.nii.gz"
            )
    description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "stroke": 1}, "numTraining": CASES}
    (raw / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
    command("nnUNetv2_plan_and_preprocess", "-d", "501", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    stored = list((folder_of("nnUNet_preprocessed") / DATASET / "nnUNetPlans_3d_fullres").glob("case_*.pkl"))
    return Finding(len(stored) == CASES, f"{len(stored)} of {CASES} cases")


@dataclass
class Training:
    """A fine-tuning from random weights, which serve as well as pre-trained ones to see what moves.

    It is killed in the second of three epochs, while the encoder is frozen, and continued across the unfreeze.

    Attributes:
        start: the encoder's tensors before it.
        frozen: nnU-Net's checkpoint at the kill.
        final: nnU-Net's checkpoint at the end.
    """

    place: Place
    backbone: str
    start: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        """One folder for each backbone, because nnU-Net's name for a model does not tell them apart."""
        return self.place.work / f"results_{self.backbone}"

    def run(self) -> Finding:
        """Train. nnU-Net compiles by default, but never on a CPU."""
        encoder = write_random_encoder(self.place, self.backbone)
        self.results.mkdir()
        train = ("nnUNetv2_train", "501", "3d_fullres", "0", "-tr", TRAINER, "-device", self.place.device.type)
        env = {"nnUNet_results": str(self.results), "nnssl_settings": SETTINGS, "nnssl_checkpoint": str(encoder)}
        command(*train, until="Epoch 1", nnUNet_n_proc_DA="0", **env)
        (fold,) = self.results.glob("*/*/fold_0")
        frozen = torch.load(fold / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
        shown = command(*train, "--c", nnUNet_n_proc_DA="2", **env)
        self.start, self.frozen = read_checkpoint(encoder).tensors, frozen
        self.final = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        losses = self.final["logging"]["train_losses"]
        compiled, wanted = "Using torch.compile" in shown, self.place.device.type == "cuda"
        text = f"{'' if compiled else 'not '}compiled; loss of the epochs {', '.join(f'{loss:.3f}' for loss in losses)}"
        whole = len(losses) == STEPS // STEPS_IN_EPOCH and bool(np.isfinite(losses).all())
        return Finding(whole and compiled == wanted, text)

    def after(self, check: Check) -> Finding:
        """Make a check that looks at what the training left."""
        return check() if self.final else Finding(False, "the training did not come to its end")

    def encoder_moved(self) -> Finding:
        """None while frozen, all of them after the unfreeze."""
        frozen, final = self.frozen["network_weights"], self.final["network_weights"]
        names = [name for name in self.start if f"encoder.{name}" in final]
        early = sum(not torch.equal(frozen[f"encoder.{name}"], self.start[name]) for name in names)
        late = sum(not torch.equal(final[f"encoder.{name}"], self.start[name]) for name in names)
        text = f"{early} of {len(names)} while frozen, {late} of {len(names)} at the end"
        return Finding(early == 0 and late == len(names) > 0, text)

    def updates_counted(self) -> Finding:
        """Each step was an update, but those that the GradScaler left out because gradients overflowed float16.

        A scaler that began anew with --c would know neither steps nor overflows from before it.
        """
        first, last = (checkpoint["optimizer_state"]["state"] for checkpoint in (self.frozen, self.final))
        updates = max(int(state["step"]) for state in last.values())
        text = f"state of {len(first)} tensors while frozen, of {len(last)} at the end; {updates} updates"
        overflows, steps_since = 0, STEPS
        if self.place.device.type == "cuda":
            scaler = self.final["grad_scaler_state"]
            overflows, steps_since = round(np.log2(FIRST_SCALE / scaler["scale"])), scaler["_growth_tracker"]
            text += f", {overflows} overflows, {steps_since} steps since the last"
        counted = updates + overflows == STEPS and (overflows > 0 or steps_since == STEPS)
        return Finding(counted and 0 < len(first) < len(last), text)

    def predicts_as_the_cpu(self) -> Finding:
        """Stock prediction: on the GPU under nnU-Net's float16 autocast, on the CPU in float32."""
        of = {device: self.predict(device) for device in {self.place.device.type, "cpu"}}
        off = float(np.abs(of[self.place.device.type] - of["cpu"]).max())
        varied = float(of["cpu"].std())
        text = f"probabilities differ by {off:.1e} at most (limit 2e-02); their standard deviation is {varied:.1e}"
        return Finding(off <= 0.02 and varied > 1e-4, text)

    def predict(self, device: str) -> np.ndarray:
        images, out = folder_of("nnUNet_raw") / DATASET / "imagesTs", self.place.work / f"{self.backbone}_{device}"
        plans = "nnUNetPlans" + Settings().updated(SETTINGS).suffix()
        model = ("-d", "501", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-p", plans, "-device", device)
        light = ("--disable_tta", "--save_probabilities", "-npp", "1", "-nps", "1")
        where = {"nnUNet_results": str(self.results)}
        command("nnUNetv2_predict", "-i", str(images), "-o", str(out), *model, *light, **where)
        (mask,), (values,) = out.glob("*.nii.gz"), out.glob("*.npz")
        probabilities = np.load(values)["probabilities"]
        if nibabel.load(mask).shape != probabilities.shape[:0:-1]:
            raise RuntimeError(f"a mask of {nibabel.load(mask).shape}, probabilities of {probabilities.shape}")
        return probabilities


def write_random_encoder(place: Place, backbone: str) -> Path:
    """Write an encoder as a finished pre-training does."""
    architecture = place.config("cl", backbone, small=True).architecture()
    torch.manual_seed(0)
    path = place.work / f"{backbone}.safetensors"
    weights = build_encoder(architecture).state_dict()
    known = {"method": "mcl_mim", "step": 0, "preprocessing": {"spacing": [VOXEL_MM] * 3}, "metadata": {}}
    write_encoder(path, weights, architecture=architecture, **known)
    return path


def command(*words: str, until: str | None = None, **variables: str) -> str:
    """Run a command to its end, or kill it when it shows a line with `until`; return what it showed.

    Raises:
        RuntimeError: it failed, took too long, or ended without that line.
    """
    dropped = ("nnssl_checkpoint", "nnssl_settings", "nnUNet_compile")  # nnU-Net's defaults are what is checked
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    process = subprocess.Popen(
        [find_program(words[0]), *words[1:]],
        env={**env, "PYTHONUNBUFFERED": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its helpers end with it
    )
    clock = threading.Timer(PATIENCE, partial(end, process))
    clock.start()
    lines, reached = [], False
    try:
        for line in process.stdout:
            lines.append(line)
            reached = until is not None and until in line
            if reached:
                break
        else:
            process.wait()
    finally:
        clock.cancel()
        end(process)
    if not reached and (process.returncode or until is not None):
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        raise RuntimeError(f"{words[0]} ended with status {process.returncode}: {last}")
    return "".join(lines)


def end(process: subprocess.Popen) -> None:
    """Kill what is left of a command and of its helpers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
