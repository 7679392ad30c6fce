"""Trainers that augment on the training device, here the CPU, inside nnU-Net's own training."""

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ssl.trainers.arms import nnUNetTrainerMCLMIM
from nnunet_ssl.trainers.gpu_augmentation import AugmentsOnDevice, nnUNetTrainerGPUAugmentation

ON_DEVICE = "steps=2,epoch_steps=1,augmentation=gpu"


@pytest.fixture
def enter(results, swin_checkpoint, monkeypatch):
    """A function that enters a workplace, with empty results of its own."""

    def enter(place, settings=ON_DEVICE):
        place.enter(
            monkeypatch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings=settings,
            nnUNet_n_proc_DA=0, nnUNet_def_n_proc=1,
        )  # fmt: skip

    return enter


def with_loaders(trainer):
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    return trainer


def shapes(batch):
    targets = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
    return [batch["data"].shape, *((one.shape, one.dtype) for one in targets)]


@pytest.mark.parametrize("place", ["workplace", "region_workplace"])
@pytest.mark.parametrize(
    ("cls", "stock"), [(nnUNetTrainerGPUAugmentation, nnUNetTrainer), (nnUNetTrainerMCLMIM, nnUNetTrainerMCLMIM)]
)
def test_workers_crop_and_the_network_and_the_validation_see_what_nnunet_shows(request, enter, place, cls, stock):
    """Deep supervision in nnU-Net's network and none in ours; labels, and regions of three channels."""
    place = request.getfixturevalue(place)
    enter(place)
    trainer = with_loaders(place.trainer(cls))
    enter(place, "steps=2,epoch_steps=1")
    stock = with_loaders(place.trainer(stock))
    raw = next(trainer.dataloader_train)
    initial = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[2]
    assert raw["data"].shape[2:] == raw["target"].shape[2:] == tuple(initial)
    assert shapes(trainer.augmented(raw)) == shapes(next(stock.dataloader_train))
    loaders = [one.dataloader_val.data_loader for one in (trainer, stock)]
    assert str(loaders[0].transforms) == str(loaders[1].transforms)
    assert shapes(next(trainer.dataloader_val)) == shapes(next(stock.dataloader_val))
    assert np.isfinite(trainer.train_step(raw)["loss"])


def test_slices_are_augmented_as_volumes_are(workplace, enter):
    """nnU-Net's two-dimensional configuration, on the volumes of the other one."""
    enter(workplace)
    batches = []
    for cls in (nnUNetTrainerGPUAugmentation, nnUNetTrainer):
        trainer = workplace.trainer(cls, "2d")
        trainer.preprocessed_dataset_folder = str(workplace.preprocessed / "nnUNetPlans_3d_fullres")
        batches.append(next(with_loaders(trainer).dataloader_train))
        if cls is nnUNetTrainerGPUAugmentation:
            batches[0] = trainer.augmented(batches[0])
    assert shapes(batches[0]) == shapes(batches[1]) and batches[0]["data"].ndim == 4


def test_a_whole_training_of_nnunets_network_goes_on_and_is_found_again(workplace, enter, monkeypatch):
    """As ``nnUNetv2_train -tr nnUNetTrainerGPUAugmentation`` makes it; stopped after an epoch, and continued."""
    enter(workplace)
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda trainer: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda logger, folder: None)
    asked = (workplace.name, "3d_fullres", 0, "nnUNetTrainerGPUAugmentation", "nnUNetPlans")
    for epochs, goes_on in ((1, False), (2, True)):
        trainer = get_trainer_from_args(*asked, goes_on, torch.device("cpu"))
        assert isinstance(trainer, nnUNetTrainer) and trainer.num_epochs == 1000
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, 1, 1
        if goes_on:
            trainer.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
        trainer.run_training()
    assert trainer.current_epoch == 2 and trainer.batch_augmentation is not None
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainerGPUAugmentation"
    found = recursive_find_trainer_class_by_name(checkpoint["trainer_name"])
    assert found.build_network_architecture is nnUNetTrainer.build_network_architecture


def test_the_seed_of_the_weights_is_not_the_augmentations(workplace, enter):
    """Every rank of a training has the weights of one seed; each is to draw patches and parameters of its own."""
    enter(workplace)
    drawn, weights = [], []
    for _ in range(2):
        trainer = with_loaders(workplace.trainer(nnUNetTrainerMCLMIM))
        drawn.append((torch.rand(4).tolist(), str(trainer.batch_augmentation.draw(2, 1, (32, 32, 32)))))
        weights.append(trainer.network.decoder.head.weight)
    assert torch.equal(*weights)
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


def test_the_setting_is_in_the_plans_and_their_name(workplace, enter):
    enter(workplace)
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    assert trainer.augments_on_device
    assert trainer.plans_manager.plans_name == "nnUNetPlans_steps2_epoch1_augmentation-gpu"
    enter(workplace, "steps=2,epoch_steps=1")
    assert not workplace.trainer(nnUNetTrainerMCLMIM).augments_on_device


@pytest.mark.parametrize("cls", [nnUNetTrainerGPUAugmentation, nnUNetTrainerMCLMIM])
@pytest.mark.parametrize(
    ("configuration", "device", "message"),
    [("3d_cascade_fullres", "cpu", "second stage of a cascade"), ("3d_fullres", "mps", "needs CUDA, not mps")],
)
def test_what_cannot_be_augmented_on_the_device_ends_with_one_line_and_no_folder(
    workplace, enter, results, cls, configuration, device, message
):
    enter(workplace)
    plans = workplace.plans() | {"continue_training": False}
    with pytest.raises(SystemExit, match=message) as ended:
        cls(plans, configuration, 0, workplace.dataset_json(), torch.device(device))
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
    assert not list(results.iterdir())


class WithDA5(AugmentsOnDevice, nnUNetTrainerDA5):
    """Somebody's trainer with transforms of its own."""

    __init__ = nnUNetTrainerGPUAugmentation.__init__


def test_a_trainer_with_other_transforms_ends_with_one_line_and_no_folder(workplace, enter, results):
    enter(workplace)
    with pytest.raises(SystemExit, match=r"^error: The trainer augments with .*Transform, which cannot be done"):
        workplace.trainer(WithDA5)
    assert not list(results.iterdir())
