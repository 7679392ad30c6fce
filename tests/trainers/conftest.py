"""Small data sets in nnU-Net's folders, small pre-trained encoders, and trainers on them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.architectures.fpn import FPNDecoder
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.weights.encoders import write_encoder

SWIN = {
    "backbone": "swin",
    "in_channels": 1,
    "embed_dim": 6,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 3,
    "mask_token": True,
}
RESENC = {"backbone": "resenc", "in_channels": 1, "features": [4, 8, 8], "blocks": [1, 2, 2]}
BACKBONES = {"swin": SWIN, "resenc": RESENC}
CASES, SHAPE = 5, (24, 26, 22)
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass
class Workplace:
    """nnU-Net's three folders with one data set, and an environment for commands on it."""

    root: Path
    name: str
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.env = {variable: str(self.root / variable) for variable in VARIABLES} | self.env

    @property
    def number(self) -> str:
        return self.name[len("Dataset") :].split("_")[0]

    @property
    def test_images(self) -> Path:
        return self.root / "nnUNet_raw" / self.name / "imagesTs"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.name

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results" / self.name

    def plans(self, name: str = "nnUNetPlans") -> dict:
        return json.loads((self.preprocessed / f"{name}.json").read_text())

    def dataset_json(self) -> dict:
        return json.loads((self.preprocessed / "dataset.json").read_text())

    def enter(self, monkeypatch, **variables) -> None:
        """Set nnU-Net's variables, and others, in this process."""
        for variable in ("nnssl_checkpoint", "nnssl_settings"):
            monkeypatch.delenv(variable, raising=False)
        for key, value in (self.env | variables).items():
            monkeypatch.setenv(key, str(value))

    def start(self, *command, **variables) -> subprocess.Popen:
        """Start a command of this environment, with its output and errors in one stream.

        None as a variable's value unsets it.
        """
        env = {key: value for key, value in os.environ.items() if key not in ("nnssl_checkpoint", "nnssl_settings")}
        # nnU-Net takes a thread for each core; waiting threads shall not burn what another process could use.
        env |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "PASSIVE"} | self.env
        env |= {key: str(value) for key, value in variables.items()}
        env = {key: value for key, value in env.items() if value != "None"}
        script, *arguments = map(str, command)
        return subprocess.Popen(
            [str(Path(sys.executable).with_name(script)), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )

    def run(self, *command, fails: bool = False, **variables) -> str:
        """Run a command to its end; return what it printed."""
        process = self.start(*command, **variables)
        shown, _ = process.communicate()
        assert (process.returncode != 0) == fails, shown
        return shown

    def save_model(self, trainer, name: str = "checkpoint_latest.pth") -> None:
        """Write what a training leaves for --c and for prediction."""
        folder = Path(trainer.output_folder_base)
        (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
        (folder / "dataset.json").write_text(json.dumps(trainer.dataset_json))
        trainer.save_checkpoint(f"{trainer.output_folder}/{name}")

    def trainer(self, cls, configuration="3d_fullres", plans="nnUNetPlans", fold=0):
        """A trainer as ``nnUNetv2_train -device cpu`` makes it."""
        plans = self.plans(plans) | {"continue_training": False}
        return cls(plans, configuration, fold, self.dataset_json(), torch.device("cpu"))


def write_raw(folder: Path, *, channels: int, labels: dict, regions: list | None, lacking: dict) -> None:
    """Write ellipsoid "brains" with a bright ball, label 1, in each; label 2, where there is one, is its core.

    The cases (by number) that lack channels get placeholders for them.
    """
    dataset = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": labels,
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(dataset | ({"regions_class_order": regions} if regions else {})))
    for case in range(CASES + 1):
        part = "Tr" if case < CASES else "Ts"
        generator = np.random.default_rng(case)
        centre = (np.array(SHAPE)[:, None, None, None] - 1) / 2
        place = np.indices(SHAPE) - centre
        brain = (place**2 / (centre * 0.9) ** 2).sum(0) < 1
        distance = np.sqrt(((place - generator.uniform(-3, 3, (3, 1, 1, 1))) ** 2).sum(0))
        truth = (distance < 5).astype(np.uint8)
        if len(labels) > 2:
            truth[distance < 3] = 2
        for channel in range(channels):
            image = np.where(brain, 100 + generator.normal(0, 5, SHAPE) + 60 * truth, 0)
            image *= channel not in lacking.get(case, ())
            save(folder / f"images{part}" / f"case_{case}_{channel:04d}.nii.gz", image.astype(np.float32))
        if part == "Tr":
            save(folder / "labelsTr" / f"case_{case}.nii.gz", truth)


def save(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), path)


def plan_and_preprocess(place: Workplace) -> None:
    """Do in this process what ``nnUNetv2_plan_and_preprocess -c 3d_fullres`` does in several, for two planners.

    A 3d_lowres on the same grid and its cascade are added by hand: nnU-Net plans them for large images only.
    """
    raw = place.root / "nnUNet_raw" / place.name
    channels = len(json.loads((raw / "dataset.json").read_text())["channel_names"])
    intensities = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    fingerprint = {
        "spacings": [[2.0, 2.0, 2.0]] * CASES,
        "shapes_after_crop": [list(SHAPE[::-1])] * CASES,
        "foreground_intensity_properties_per_channel": {str(channel): intensities for channel in range(channels)},
        "median_relative_size_after_cropping": 1.0,
    }
    place.preprocessed.mkdir(parents=True)
    (place.preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    ExperimentPlanner(place.name).plan_experiment()
    nnUNetPlannerResEncL(place.name).plan_experiment()
    plans = place.plans()
    configurations = plans["configurations"]
    configurations["3d_lowres"] = configurations["3d_fullres"] | {"batch_dice": True}
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (place.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    residual = place.plans("nnUNetResEncUNetLPlans")
    network = residual["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [4, 8, 8, 8, 8][: network["n_stages"]]
    network["n_blocks_per_stage"] = [1, 2, 2, 2, 2][: network["n_stages"]]
    (place.preprocessed / "nnUNetResEncUNetLPlans.json").write_text(json.dumps(residual))

    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    folder = place.preprocessed / configuration.data_identifier
    truths = place.preprocessed / "gt_segmentations"
    shutil.copytree(raw / "labelsTr", truths)
    folder.mkdir()
    dataset = json.loads((raw / "dataset.json").read_text())
    for case, files in get_filenames_of_train_images_and_targets(str(raw), dataset).items():
        DefaultPreprocessor(verbose=False).run_case_save(
            str(folder / case), files["images"], files["label"], manager, configuration, dataset
        )


def make_workplace(root: Path, name: str, *, channels=1, labels=None, regions=None, lacking=None) -> Workplace:
    place = Workplace(root, name)
    with pytest.MonkeyPatch.context() as patch:
        place.enter(patch, nnUNet_n_proc_DA="1")
        write_raw(
            root / "nnUNet_raw" / name,
            channels=channels,
            labels=labels or {"background": 0, "lesion": 1},
            regions=regions,
            lacking=lacking or {},
        )
        plan_and_preprocess(place)
    (root / "nnUNet_results").mkdir()
    return place


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    """One channel, one foreground label."""
    return make_workplace(tmp_path_factory.mktemp("one_channel"), "Dataset701_Ball")


@pytest.fixture(scope="session")
def region_workplace(tmp_path_factory) -> Workplace:
    """Three channels, two overlapping regions."""
    labels = {"background": 0, "ball": [1, 2], "core": 2}
    return make_workplace(
        tmp_path_factory.mktemp("regions"), "Dataset702_Regions", channels=3, labels=labels, regions=[1, 2]
    )


@pytest.fixture(scope="session")
def incomplete(tmp_path_factory) -> Workplace:
    """Three channels, of which the first case lacks the first, and the second case the others."""
    folder = tmp_path_factory.mktemp("incomplete")
    return make_workplace(folder, "Dataset703_Incomplete", channels=3, lacking={0: (0,), 1: (1, 2)})


@pytest.fixture(scope="session")
def write_checkpoint():
    """A function that writes random weights into a folder as a finished pre-training does."""

    def write(folder: Path, architecture: dict, *, decoder: bool = False) -> Path:
        torch.manual_seed(1)
        encoder = build_encoder(architecture)
        fpn = FPNDecoder(encoder.channels, 1, width=8, stride=encoder.strides[0])
        write_encoder(
            folder / "encoder.safetensors",
            encoder.state_dict(),
            architecture=architecture,
            method="mcl_mim",
            step=7,
            preprocessing={"spacing": [1.0, 1.0, 1.0]},
            metadata={},
            decoder=fpn.state_dict() if decoder else None,
        )
        return folder / "encoder.safetensors"

    return write


@pytest.fixture(scope="session")
def swin_checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("swin"), SWIN)


@pytest.fixture(scope="session")
def resenc_checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("resenc"), RESENC)


@pytest.fixture(scope="session")
def masked_checkpoints(write_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """As masked modelling leaves them, with its decoder, by backbone."""
    folders = {name: tmp_path_factory.mktemp(f"masked_{name}") for name in ("swin", "resenc")}
    return {name: write_checkpoint(folders[name], one, decoder=True) for name, one in BACKBONES.items()}


@pytest.fixture
def results(tmp_path) -> Path:
    """An empty nnUNet_results of its own for a test that trains in a shared workplace."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder
