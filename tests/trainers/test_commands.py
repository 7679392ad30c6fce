"""nnU-Net's own command lines on the trainers: train, continue, validate, predict, compare, export, install."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_ssl.trainers.arms import nnUNetTrainerMCLMIM

pytestmark = pytest.mark.slow
TRAINER = "nnUNetTrainerMCLMIM"
SETTINGS = "steps=2,epoch_steps=1,freeze_share=0.5,lr=0.01"
PLANS = "nnUNetPlans_steps2_epoch1_freeze0.5_lr0.01"
LIGHT = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta", "--save_probabilities")


def predict(place, folder, *, trainer=TRAINER, plans=PLANS, **variables) -> np.ndarray:
    """Predict the test case by the trained model; return its probabilities."""
    which = ("-d", place.number, "-c", "3d_fullres", "-f", "0", "-tr", trainer, "-p", plans)
    place.run("nnUNetv2_predict", "-i", place.test_images, "-o", folder, *which, *LIGHT, **variables)
    return probabilities(folder)


def probabilities(folder) -> np.ndarray:
    (file,) = Path(folder).glob("*.npz")
    values = np.load(file)["probabilities"]
    (mask,) = Path(folder).glob("*.nii.gz")
    assert nibabel.load(mask).shape == values.shape[:0:-1]
    assert values.std() > 1e-4
    return values


@pytest.fixture(scope="module")
def trained(workplace, swin_checkpoint):
    """The workplace after a training that found its checkpoint by itself, as `nnssl_pretrain` leaves it."""
    pretrained = workplace.results.parent / "Dataset500_FOMO60K" / "mcl_mim" / "encoder.safetensors"
    pretrained.parent.mkdir(parents=True)
    shutil.copy(swin_checkpoint, pretrained)
    shown = workplace.run(
        "nnUNetv2_train", workplace.number, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu", "--npz",
        nnssl_settings=SETTINGS,
    )  # fmt: skip
    assert f"Pre-trained encoder: {pretrained}" in shown
    assert f"-p {PLANS}" in shown
    assert "Step 0: encoder frozen" in shown and "Step 1: encoder unfrozen" in shown
    shutil.rmtree(pretrained.parents[1])  # nothing later may need it
    return workplace


@pytest.fixture(scope="module")
def prediction(trained, tmp_path_factory):
    return predict(trained, tmp_path_factory.mktemp("prediction"))


def test_training_leaves_what_nnunet_leaves(trained):
    fold = trained.results / f"{TRAINER}__{PLANS}__3d_fullres" / "fold_0"
    names = {path.name for path in fold.iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "validation", "debug.json"} <= names
    assert "checkpoint_latest.pth" not in names
    assert len(list((fold / "validation").glob("*.npz"))) == 1
    assert [path.name for path in trained.results.iterdir()] == [f"{TRAINER}__{PLANS}__3d_fullres"]


def test_validation_and_continuation_need_neither_the_checkpoint_nor_the_settings(
    trained, swin_checkpoint, monkeypatch
):
    command = ("nnUNetv2_train", trained.number, "3d_fullres")
    options = ("-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    assert "Validation complete" in trained.run(*command, 0, *options, "--val")

    with monkeypatch.context() as patch:
        trained.enter(patch, nnssl_checkpoint=swin_checkpoint, nnssl_settings=SETTINGS)
        stopped = trained.trainer(nnUNetTrainerMCLMIM, fold=1)
        stopped.initialize()
        stopped._best_ema = 0.0
        for key in ("epoch_start_timestamps", "epoch_end_timestamps", "train_losses", "val_losses", "lrs"):
            stopped.logger.log(key, 1.0, 0)
        stopped.logger.log("mean_fg_dice", 0.0, 0)
        stopped.logger.log("dice_per_class_or_region", [0.0], 0)
        trained.save_model(stopped)
    shown = trained.run(*command, 1, *options, "--c")
    assert "Epoch 1" in shown and "Epoch 0" not in shown
    assert "Step 1: encoder" not in shown, "it goes on unfrozen"
    assert "Training done" in shown and "Validation complete" in shown


def test_a_model_folder_predicts_what_its_name_predicts(trained, prediction, tmp_path):
    model = trained.results / f"{TRAINER}__{PLANS}__3d_fullres"
    what = ("-i", trained.test_images, "-o", tmp_path, "-m", model, "-f", "0")
    trained.run("nnUNetv2_predict_from_modelfolder", *what, *LIGHT)
    np.testing.assert_array_equal(probabilities(tmp_path), prediction)


def test_an_exported_model_predicts_the_same_elsewhere(trained, prediction, tmp_path):
    shown = trained.run(
        "nnUNetv2_find_best_configuration", trained.number, "-p", PLANS, "-c", "3d_fullres", "-tr", TRAINER, "-f", 0,
        "-np", 1,
    )  # fmt: skip
    assert f"-tr {TRAINER} -c 3d_fullres -p {PLANS}" in shown
    archive = tmp_path / "model.zip"
    trained.run(
        "nnUNetv2_export_model_to_zip", "-d", trained.number, "-o", archive, "-c", "3d_fullres", "-tr", TRAINER,
        "-p", PLANS, "-f", 0,
    )  # fmt: skip
    elsewhere = {"nnUNet_results": tmp_path / "elsewhere", "nnUNet_raw": None, "nnUNet_preprocessed": None}
    elsewhere["nnUNet_results"].mkdir()
    trained.run("nnUNetv2_install_pretrained_model_from_zip", archive, **elsewhere)
    np.testing.assert_array_equal(predict(trained, tmp_path / "out", **elsewhere), prediction)


def test_a_residual_network_trains_and_predicts_with_three_channels_and_regions(
    region_workplace, resenc_checkpoint, tmp_path
):
    shown = region_workplace.run(
        "nnUNetv2_train", region_workplace.number, "3d_fullres", 0, "-tr", "nnUNetTrainerSSL",
        "-p", "nnUNetResEncUNetLPlans", "-device", "cpu", nnssl_settings=SETTINGS, nnssl_checkpoint=resenc_checkpoint,
    )  # fmt: skip
    assert "stem.convs.0.conv.weight" in shown and "adapted: 1" in shown
    plans = PLANS.replace("nnUNetPlans", "nnUNetResEncUNetLPlans")
    assert predict(region_workplace, tmp_path, trainer="nnUNetTrainerSSL", plans=plans).shape[0] == 2


def test_a_mistake_ends_a_command_with_one_line_and_status_1(workplace, tmp_path):
    shown = workplace.run(
        "nnUNetv2_train", workplace.number, "3d_fullres", 0, "-tr", "nnUNetTrainerMIM", "-device", "cpu",
        fails=True, nnUNet_results=tmp_path,
    )  # fmt: skip
    assert len([line for line in shown.splitlines() if line.startswith("error: nnUNetTrainerMIM needs")]) == 1
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())
