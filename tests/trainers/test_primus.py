"""Fine-tuning Primus: its patch, its optimizer, its network in the plans."""

import foreign
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_ssl.trainers.arms import nnUNetTrainerSSL
from nnunet_ssl.trainers.freezing import unwrapped


@pytest.fixture
def primus_file(tmp_path):
    torch.save(foreign.primus_checkpoint(foreign.primus()), tmp_path / "checkpoint_final.pth")
    return tmp_path / "checkpoint_final.pth"


@pytest.fixture
def initialize(workplace, primus_file, results, monkeypatch):
    def initialize(settings):
        workplace.enter(monkeypatch, nnssl_checkpoint=primus_file, nnssl_settings=settings, nnUNet_results=results)
        trainer = workplace.trainer(nnUNetTrainerSSL)
        trainer.initialize()
        return trainer

    return initialize


def test_the_network_of_the_plans_is_the_checkpoints_and_learns_as_its_authors_say(initialize, primus_file):
    trainer = initialize("recipe=primus,patch_size=16x24x16,steps=4,epoch_steps=1")
    network = unwrapped(trainer.network)
    weights = torch.load(primus_file)["network_weights"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.encoder.state_dict().items())

    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.05}
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.98)}
    assert {group["peak_lr"] for group in groups} == {1e-4}
    assert trainer.schedule.freeze_steps == 0

    entry = trainer.configuration_manager.configuration["architecture"]
    rebuilt = get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 1, 2, deep_supervision=False
    )
    rebuilt.load_state_dict(network.state_dict())
    x = torch.randn(1, 1, 16, 24, 16)
    torch.testing.assert_close(rebuilt.eval()(x), network.eval()(x))


def test_a_patch_of_parts_of_tokens_is_refused_with_the_nearest(initialize, capsys):
    with pytest.raises(SystemExit) as refused:
        initialize("patch_size=20x24x12")
    assert "multiples of 8" in str(refused.value) and "patch_size=16x24x16" in str(refused.value)


def test_another_recipe_is_taken_and_the_authors_is_named(initialize, capsys):
    initialize("patch_size=16x16x16")
    assert "nnssl_settings=recipe=primus" in capsys.readouterr().out
