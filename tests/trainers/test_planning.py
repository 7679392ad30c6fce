"""Plans with the geometry of pre-training, and the command that makes them."""

import json

import blosc2
import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ssl.architectures.backbones.resenc import stage_differences
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.arms import nnUNetTrainerMCLMIM
from nnunet_ssl.trainers.networks import network_entry
from nnunet_ssl.trainers.planning import PretrainingPlanner, plan_and_preprocess


@pytest.fixture
def plans(workplace, tmp_path, monkeypatch):
    """The plans, made from the fingerprint of the shared data set in a folder of their own."""
    folder = tmp_path / workplace.name
    folder.mkdir()
    for name in ("dataset_fingerprint.json", "dataset.json"):
        folder.joinpath(name).write_bytes((workplace.preprocessed / name).read_bytes())
    workplace.enter(monkeypatch, nnUNet_preprocessed=tmp_path, nnUNet_n_proc_DA=1)
    PretrainingPlanner(workplace.name).plan_experiment()
    return json.loads((folder / "nnUNetSSLPlans.json").read_text())


def test_the_plans_have_the_geometry_of_pre_training(plans):
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["transpose_forward"] == plans["transpose_backward"] == [0, 1, 2]
    assert list(plans["configurations"]) == ["3d_fullres"]
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [1, 1, 1]
    assert configuration["patch_size"] == [96, 96, 96] and configuration["batch_size"] == 8
    assert configuration["data_identifier"] == "nnUNetSSLPlans_3d_fullres"
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert configuration["use_mask_for_norm"] == [True]


def test_a_residual_encoder_pre_trained_on_such_patches_finds_all_its_stages(plans):
    resenc = {"backbone": "resenc", "in_channels": 1, "features": [32, 64, 128, 256, 320, 320], "blocks": [1] * 6}
    planned = plans["configurations"]["3d_fullres"]["architecture"]
    assert planned["network_class_name"].endswith("PlainConvUNet")
    assert planned["arch_kwargs"]["features_per_stage"] == resenc["features"]
    assert stage_differences(resenc, network_entry(resenc, planned)) == []


@pytest.mark.slow
def test_one_command_plans_and_preprocesses_and_stock_prediction_takes_the_plans(
    workplace, swin_checkpoint, results, tmp_path, monkeypatch
):
    shown = workplace.run("nnssl_plan", "-d", workplace.number, "-np", 1, nnUNet_n_proc_DA=1)
    assert "nnUNetv2_train 701 3d_fullres 0 -tr nnUNetTrainerMCLMIM -p nnUNetSSLPlans" in shown
    cases = sorted((workplace.preprocessed / "nnUNetSSLPlans_3d_fullres").glob("case_?.b2nd"))
    assert len(cases) == 5
    data = blosc2.open(str(cases[0]))[0]
    assert min(data.shape) > 26, "2 mm voxels have become 1 mm"
    inside = data[blosc2.open(str(cases[0]).replace(".b2nd", "_seg.b2nd"))[0] >= 0]
    assert abs(inside.mean()) < 0.1 and abs(inside.std() - 1) < 0.1

    workplace.enter(
        monkeypatch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings="patch_size=48x48x48"
    )
    trainer = workplace.trainer(nnUNetTrainerMCLMIM, plans="nnUNetSSLPlans")
    trainer.initialize()
    workplace.save_model(trainer, "checkpoint_final.pth")
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, use_folds=(0,))
    predictor.predict_from_files_sequential(str(workplace.test_images), str(tmp_path))
    (image,) = workplace.test_images.iterdir()
    (mask,) = tmp_path.glob("*.nii.gz")
    assert nibabel.load(mask).shape == nibabel.load(image).shape
    np.testing.assert_allclose(nibabel.load(mask).affine, nibabel.load(image).affine)


def test_a_wrong_data_set_is_named(workplace, monkeypatch):
    workplace.enter(monkeypatch)
    with pytest.raises(UserError, match=r"There is no data set 999.*Dataset701_Ball"):
        plan_and_preprocess("999", 1)
