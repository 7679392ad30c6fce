"""nnU-Net's own command lines on the trainers: train, continue, validate, predict, compare, export, install."""

import re
import shutil
from pathlib import Path

import foreign
import matplotlib
import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import nnunet_ssl
from nnunet_ssl.deployment.packaging import package
from nnunet_ssl.deployment.segmenting import Segmenter
from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import read_volume

pytestmark = pytest.mark.slow
TRAINER = "nnUNetTrainerMCLMIM"
SETTINGS = "steps=2,epoch_steps=1,freeze_share=0.5,lr=0.01"
PLANS = "nnUNetPlans_steps2_epoch1_freeze0.5_lr0.01"
LIGHT = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta", "--save_probabilities")


def predict(place, folder, *, trainer=TRAINER, plans=PLANS, configuration="3d_fullres", **variables) -> np.ndarray:
    """Predict the test case by the trained model; return its probabilities."""
    which = ("-d", place.number, "-c", configuration, "-f", "0", "-tr", trainer, "-p", plans)
    place.run("nnUNetv2_predict", "-i", place.test_images, "-o", folder, *which, *LIGHT, **variables)
    return probabilities(folder)


def probabilities(folder) -> np.ndarray:
    (file,) = Path(folder).glob("*.npz")
    values = np.load(file)["probabilities"]
    (mask,) = Path(folder).glob("*.nii.gz")
    assert nibabel.load(mask).shape == values.shape[:0:-1]
    assert values.std() > 1e-4
    return values


def predict_with_mirroring(place, folder) -> nibabel.Nifti1Image:
    which = ("-d", place.number, "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-p", PLANS)
    place.run("nnUNetv2_predict", "-i", place.test_images, "-o", folder, *which, *LIGHT[:6])
    return nibabel.load(next(folder.glob("*.nii.gz")))


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


def test_validation_needs_neither_the_checkpoint_nor_the_settings(trained):
    options = ("-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    assert "Validation complete" in trained.run("nnUNetv2_train", trained.number, "3d_fullres", 0, *options, "--val")


def test_a_killed_training_goes_on_without_the_checkpoint_and_the_settings(workplace, swin_checkpoint):
    command = ("nnUNetv2_train", workplace.number, "3d_fullres", 1, "-tr", TRAINER, "-device", "cpu")
    settings = "steps=7,epoch_steps=1,augmentation=gpu"
    process = workplace.start(*command, nnssl_settings=settings, nnssl_checkpoint=swin_checkpoint, PYTHONUNBUFFERED="1")
    shown = iter(process.stdout.readline, "")
    assert any("Step 2: encoder unfrozen" in line for line in shown)
    assert any("Epoch 4" in line for line in shown)
    process.kill()
    process.communicate()
    shown = workplace.run(*command, "-p", "nnUNetPlans_steps7_epoch1_augmentation-gpu", "--c")
    assert "Epoch 3" not in shown and "Epoch 4" in shown and "Epoch 6" in shown
    assert "encoder frozen" not in shown, "it goes on unfrozen"
    assert "Training done" in shown and "Validation complete" in shown


def test_a_model_folder_predicts_what_its_name_predicts(trained, prediction, tmp_path):
    model = trained.results / f"{TRAINER}__{PLANS}__3d_fullres"
    what = ("-i", trained.test_images, "-o", tmp_path, "-m", model, "-f", "0")
    trained.run("nnUNetv2_predict_from_modelfolder", *what, *LIGHT)
    np.testing.assert_array_equal(probabilities(tmp_path), prediction)


def test_segmenting_in_python_gives_what_the_command_writes(trained, prediction, tmp_path):
    model, (image,) = trained.results / f"{TRAINER}__{PLANS}__3d_fullres", sorted(trained.test_images.glob("*"))
    written = predict_with_mirroring(trained, tmp_path)
    matplotlib.use("svg")
    for case in (image, [image]):
        (segmented,) = nnunet_ssl.segment(model, [case], device="cpu")
        np.testing.assert_array_equal(segmented.dataobj, written.dataobj)
        np.testing.assert_array_equal(segmented.affine, nibabel.load(image).affine)
    assert matplotlib.get_backend() == "svg", "a notebook would show no figure any more"
    with pytest.raises(UserError, match=r"finished folds 0, not \[3\]"):
        nnunet_ssl.segment(model, [image], folds=[3])
    with pytest.raises(UserError, match=r"1 channels \(MR0\).* has 2"):
        nnunet_ssl.segment(model, [[image, image]])


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


def test_3d_lowres_trains_too_and_nnunet_compares_and_ensembles_both(trained, swin_checkpoint, tmp_path):
    trained.run(
        "nnUNetv2_train", trained.number, "3d_lowres", 0, "-tr", TRAINER, "-device", "cpu", "--npz",
        nnssl_settings=SETTINGS, nnssl_checkpoint=swin_checkpoint,
    )  # fmt: skip
    shown = trained.run(
        "nnUNetv2_find_best_configuration", trained.number, "-p", PLANS, "-c", "3d_fullres", "3d_lowres",
        "-tr", TRAINER, "-f", 0, "-np", 1,
    )  # fmt: skip
    names = [f"{TRAINER}__{PLANS}__{configuration}" for configuration in ("3d_fullres", "3d_lowres")]
    assert f"ensemble___{names[0]}___{names[1]}___0" in shown
    full = predict(trained, tmp_path / "full")
    low = predict(trained, tmp_path / "low", configuration="3d_lowres")
    trained.run(
        "nnUNetv2_ensemble", "-i", tmp_path / "full", tmp_path / "low", "-o", tmp_path / "both", "-np", 1, "--save_npz"
    )
    np.testing.assert_allclose(probabilities(tmp_path / "both"), (full + low) / 2, atol=1e-3)


def test_a_recipe_trains_validates_and_predicts_under_its_own_name(workplace, swin_checkpoint, results, tmp_path):
    command = ("nnUNetv2_train", workplace.number, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu")
    settings = "recipe=long,steps=4,epoch_steps=1,average_share=0.5"
    shown = workplace.run(*command, nnssl_settings=settings, nnssl_checkpoint=swin_checkpoint, nnUNet_results=results)
    plans = "nnUNetPlans_recipe-long_steps4_epoch1_average0.5"
    assert f"-p {plans}" in shown and "encoder frozen" not in shown and "paper's" not in shown
    assert "mean of those after each of the last 2 epochs" in shown and "Validation complete" in shown
    dice = re.search("Mean Validation Dice:.*", shown).group()
    assert dice in workplace.run(*command, "-p", plans, "--val", nnUNet_results=results), "the same weights"
    predict(workplace, tmp_path, plans=plans, nnUNet_results=results)


def test_a_unets_decoder_is_trained_at_3d_lowres_exported_and_predicts_elsewhere(
    workplace, swin_checkpoint, results, tmp_path
):
    shown = workplace.run(
        "nnUNetv2_train", workplace.number, "3d_lowres", 0, "-tr", TRAINER, "-device", "cpu",
        nnssl_settings="recipe=quick,steps=2,epoch_steps=1,decoder=unet", nnssl_checkpoint=swin_checkpoint,
        nnUNet_results=results,
    )  # fmt: skip
    assert "SwinUNet instead of the plans' PlainConvUNet" in shown and "Validation complete" in shown
    plans, archive = "nnUNetPlans_recipe-quick_steps2_epoch1_decoder-unet", tmp_path / "model.zip"
    model = ("-d", workplace.number, "-c", "3d_lowres", "-tr", TRAINER, "-p", plans, "-f", 0)
    workplace.run("nnUNetv2_export_model_to_zip", "-o", archive, *model, nnUNet_results=results)
    elsewhere = {"nnUNet_results": tmp_path / "elsewhere", "nnUNet_raw": None, "nnUNet_preprocessed": None}
    elsewhere["nnUNet_results"].mkdir()
    workplace.run("nnUNetv2_install_pretrained_model_from_zip", archive, **elsewhere)
    predict(workplace, tmp_path / "out", plans=plans, configuration="3d_lowres", **elsewhere)


PUBLISHED = {
    "umbra": lambda: foreign.umbra_checkpoint(foreign.umbra_encoder(), "both"),
    "monai": lambda: foreign.monai_encoder(**foreign.SMALL).state_dict(),
    "nnssl": lambda: foreign.nnssl_checkpoint(foreign.resenc_unet(features=(4, 8, 8), blocks=(1, 2, 2))),
    "primus": lambda: foreign.primus_checkpoint(foreign.primus()),
}


@pytest.mark.parametrize("origin", PUBLISHED)
def test_weights_of_others_are_taken_as_they_were_published(workplace, tmp_path, results, origin):
    file = tmp_path / "published.ckpt"
    torch.save(PUBLISHED[origin](), file)
    plans = "nnUNetResEncUNetLPlans" if origin == "nnssl" else "nnUNetPlans"
    command = ("nnUNetv2_train", workplace.number, "3d_fullres", 0, "-tr", "nnUNetTrainerSSL", "-p", plans)
    given = {"nnssl_settings": "steps=1,epoch_steps=1", "nnssl_checkpoint": file, "nnUNet_results": results}
    suffix = "_steps1_epoch1"
    if origin == "monai":  # whose files do not tell how patches are merged
        refused = workplace.run(*command, "-device", "cpu", **given, fails=True)
        assert "nnssl_settings=merging=" in refused and not list(results.rglob("*.pth"))
        given["nnssl_settings"] += ",merging=monai"
        suffix += "_merging-monai"
    if origin == "primus":
        given["nnssl_settings"] = "recipe=primus,steps=1,epoch_steps=1,patch_size=24x32x24"
        suffix = "_recipe-primus_steps1_epoch1_patch24x32x24"
    shown = workplace.run(*command, "-device", "cpu", **given)
    assert f"Pre-trained encoder: {file}" in shown
    assert f"origin {'nnssl' if origin == 'primus' else origin}" in shown
    assert "100.0% of the encoder loaded" in shown
    file.unlink()
    what = {"trainer": "nnUNetTrainerSSL", "plans": f"{plans}{suffix}"}
    predict(workplace, tmp_path / "out", **what, nnUNet_results=results)


def test_a_residual_network_trains_and_predicts_with_three_channels_and_regions(
    region_workplace, resenc_checkpoint, tmp_path
):
    shown = region_workplace.run(
        "nnUNetv2_train", region_workplace.number, "3d_fullres", 0, "-tr", "nnUNetTrainerSSL",
        "-p", "nnUNetResEncUNetLPlans", "-device", "cpu", nnssl_settings=f"{SETTINGS},augmentation=gpu",
        nnssl_checkpoint=resenc_checkpoint,
    )  # fmt: skip
    assert "stem.convs.0.conv.weight" in shown and "adapted: 1" in shown
    plans = PLANS.replace("nnUNetPlans", "nnUNetResEncUNetLPlans") + "_augmentation-gpu"
    assert predict(region_workplace, tmp_path, trainer="nnUNetTrainerSSL", plans=plans).shape[0] == 2


def test_a_mistake_ends_a_command_with_one_line_and_status_1(workplace, tmp_path):
    shown = workplace.run(
        "nnUNetv2_train", workplace.number, "3d_fullres", 0, "-tr", "nnUNetTrainerMIM", "-device", "cpu",
        fails=True, nnUNet_results=tmp_path,
    )  # fmt: skip
    assert len([line for line in shown.splitlines() if line.startswith("error: nnUNetTrainerMIM needs")]) == 1
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_an_old_pytorch_ends_a_training_with_one_line_and_status_1(workplace, tmp_path, installed):
    shown = workplace.run(
        "nnUNetv2_train", workplace.number, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu",
        fails=True, nnUNet_results=tmp_path, PYTHONPATH=installed("torch", "2.5.1"),
    )  # fmt: skip
    assert "error: nnunet_ssl needs torch" in shown.splitlines()[-1]
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_the_operating_points_command_predicts_held_out_cases_without_mirroring(trained, tmp_path):
    model = trained.results / f"{TRAINER}__{PLANS}__3d_fullres"
    shown = trained.run("nnssl_operate", model, "--mirroring", "-device", "cpu", "-o", tmp_path / "point", fails=True)
    assert "All cases are of one unit" in shown  # the fold held out a single case
    mirrored, plain = (probabilities(model / "fold_0" / name) for name in ("validation", "validation_unmirrored"))
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    (case,) = (path.stem for path in (model / "fold_0" / "validation").glob("*.npz"))
    image = trained.root / "nnUNet_raw" / trained.name / "imagesTr" / f"{case}_0000.nii.gz"
    read = predictor.plans_manager.image_reader_writer_class().read_images([str(image)])
    _, expected = predictor.predict_single_npy_array(*read, None, None, True)
    np.testing.assert_allclose(plain, expected, atol=2e-3)
    assert np.abs(mirrored - plain).max() > 5e-3


def test_a_packaged_model_gives_what_nnunet_predicts(trained, prediction, tmp_path):
    model = trained.results / f"{TRAINER}__{PLANS}__3d_fullres"
    (tmp_path / "operating_point.json").write_text('{"point": {"mirroring": false}}')
    package([model], tmp_path / "package", learned=tmp_path)
    segmenter = Segmenter(tmp_path / "package" / "model", torch.device("cpu"))
    (image,) = trained.test_images.glob("*.nii.gz")
    result = segmenter.segment([read_volume(image)])
    np.testing.assert_allclose(result.probabilities.array, prediction[1].transpose(2, 1, 0), atol=2e-3)
    assert segmenter.embed([read_volume(image)]).shape == (96,)  # the Swin encoder's deepest map
