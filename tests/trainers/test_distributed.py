"""What ``nnUNetv2_train -num_gpus 2`` does, with two CPU processes in the place of two GPUs.

nnU-Net's command insists on CUDA, so the test does the command's few lines itself: the rest is nnU-Net's own training
and validation, in which each process has another number of cases to predict.
"""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl.trainers.arms import nnUNetTrainerMCLMIM
from nnunet_ssl.trainers.freezing import unwrapped
from nnunet_ssl.weights.encoders import read_checkpoint


def run_as_one_of_two(rank: int, rendezvous: str, plans: dict, dataset_json: dict, folder: str) -> None:
    """Do what nnU-Net's `run_ddp` does, on the CPU."""
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    nnunet.DDP = lambda network, device_ids: DistributedDataParallel(network)
    trainer = nnUNetTrainerMCLMIM(plans | {"continue_training": False}, "3d_fullres", 0, dataset_json)
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    trainer.initialize()
    assert not trainer.network.will_sync_module_buffers()
    trainer.run_training()
    assert not trainer.network.will_sync_module_buffers(), "validation would wait for the other process's cases"
    trainer.perform_actual_validation()
    torch.save(unwrapped(trainer.network).state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


SETTINGS = {
    "paper": "steps=4,epoch_steps=2,freeze_share=0.5,lr=0.01",
    "sawtooth, SGD, TopK, averaged, augmented on the device": "steps=6,epoch_steps=2,schedule=sawtooth,"
    "freeze_share=0.34,optimizer=sgd,loss=dice_topk,average_share=0.6,lr=0.01,augmentation=gpu",
    "U-Net": "steps=4,epoch_steps=2,freeze_share=0.5,lr=0.01,decoder=unet",
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_two_processes_train_validate_and_end_together(
    workplace, swin_checkpoint, results, monkeypatch, tmp_path, settings
):
    workplace.enter(
        monkeypatch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings=settings,
        nnUNet_n_proc_DA=0, nnUNet_def_n_proc=1,
    )  # fmt: skip
    arguments = (str(tmp_path / "rendezvous"), workplace.plans(), workplace.dataset_json(), str(tmp_path))
    mp.spawn(run_as_one_of_two, arguments, nprocs=2)

    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    pretrained = read_checkpoint(swin_checkpoint).tensors
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if (kept := pretrained.get(name.removeprefix("encoder."))) is not None:
            assert not torch.equal(tensor, kept), f"{name} has not moved"
    (file,) = Path(results).glob("*/*/fold_0/checkpoint_final.pth")
    for name, tensor in torch.load(file, weights_only=False)["network_weights"].items():
        assert torch.equal(tensor, first[name]), name
    (fold,) = Path(results).glob("*/*/fold_0")
    assert (fold / "checkpoint_final.pth").is_file() and (fold / "validation" / "summary.json").is_file()
    log = "".join(path.read_text() for path in fold.glob("training_log_*.txt"))
    assert "Step 0: encoder frozen" in log and "Step 2: encoder unfrozen" in log
