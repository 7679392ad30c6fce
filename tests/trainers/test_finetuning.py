"""The trainer inside nnU-Net's classes, step by step on batches that do not change."""

import copy
import functools
import itertools
import shutil
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder
from torch._dynamo import OptimizedModule

from nnunet_ssl.architectures.networks import ResEncFPN, SwinFPN, SwinUNet, build_encoder
from nnunet_ssl.architectures.swin import MERGINGS
from nnunet_ssl.trainers import averaging
from nnunet_ssl.trainers.arms import nnUNetTrainerMCLMIM, nnUNetTrainerMIM, nnUNetTrainerSwinFPNScratch
from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL
from nnunet_ssl.trainers.freezing import unwrapped
from nnunet_ssl.trainers.provenance import source_of
from nnunet_ssl.trainers.settings import Settings
from nnunet_ssl.weights.encoders import read_checkpoint, write_encoder

STEPS = "steps=6,epoch_steps=2,freeze_share=0.5,lr=0.01"  # the encoder moves from the second step of the second epoch


@pytest.fixture(autouse=True)
def paths(workplace, results, swin_checkpoint, monkeypatch):
    workplace.enter(
        monkeypatch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings=STEPS, nnUNet_n_proc_DA=0
    )


def batch_for(trainer, seed):
    """A batch as nnU-Net's loader gives it, targets at every scale that the network supervises."""
    generator = torch.Generator().manual_seed(seed)
    size = trainer.configuration_manager.patch_size
    data = torch.randn(2, trainer.num_input_channels, *size, generator=generator)
    classes = 2 if not trainer.label_manager.has_ignore_label else 3
    if trainer.label_manager.has_regions:
        target = (
            torch.rand(2, len(trainer.label_manager.foreground_regions), *size, generator=generator) > 0.5
        ).float()
    else:
        target = torch.randint(0, classes, (2, 1, *size), generator=generator).float()
    if not trainer.enable_deep_supervision:
        return {"data": data, "target": target}
    scales = trainer._get_deep_supervision_scales()
    small = [[round(length * factor) for length, factor in zip(size, scale)] for scale in scales]
    return {"data": data, "target": [torch.nn.functional.interpolate(target, size=shape) for shape in small]}


def train_epochs(trainer, epochs):
    """Run epochs of `run_training` without data loaders, validation and logs; yield the encoder after every step."""
    for epoch in epochs:
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for index in range(trainer.num_iterations_per_epoch):
            trainer.train_step(batch_for(trainer, 10 * epoch + index))
            yield {name: tensor.clone() for name, tensor in unwrapped(trainer.network).encoder.state_dict().items()}


def log_of(trainer):
    return "".join(path.read_text() for path in Path(trainer.output_folder).glob("training_log_*.txt"))


def test_the_encoder_starts_from_the_checkpoint_rests_and_then_moves(workplace, swin_checkpoint):
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    pretrained = read_checkpoint(swin_checkpoint).tensors
    states = list(train_epochs(trainer, range(3)))
    assert trainer.schedule.freeze_steps == 3
    for state in states[:3]:
        assert all(torch.equal(tensor, pretrained[name]) for name, tensor in state.items())
    for before, after in itertools.pairwise(states[2:]):
        assert all(not torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.fixture
def fixed_batches(monkeypatch):
    """Let whole trainings take the same batches, whatever was interrupted; yields the weights after each epoch.

    Of all trainings of a test, one after another.
    """

    def loaders(trainer):
        def batches():
            while True:
                yield batch_for(trainer, 10 * trainer.current_epoch + trainer.step_in_epoch)

        return batches(), batches()

    states, end_epoch = [], nnUNetTrainer.on_epoch_end

    def recorded(trainer):
        states.append(copy.deepcopy(unwrapped(trainer.network).state_dict()))
        end_epoch(trainer)

    for costly in ("plot_network_architecture", "_save_debug_information"):
        monkeypatch.setattr(nnUNetTrainer, costly, lambda trainer: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda logger, folder: None)
    monkeypatch.setattr(nnUNetTrainer, "get_dataloaders", loaders)
    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", recorded)
    return states


def interrupted_after(monkeypatch, epoch):
    """Let the process die when the checkpoint of an epoch is written."""
    end_epoch = nnUNetTrainer.on_epoch_end

    def killed(trainer):
        end_epoch(trainer)
        if trainer.current_epoch > epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", killed)


def check_that_a_training_goes_on_as_if_it_had_not_been_broken(workplace, monkeypatch, states, stop, plans):
    """And ends, broken or not, with the mean of the weights after its last three epochs."""
    cls, settings = nnUNetTrainerMCLMIM, Settings().updated_from_environment()
    unbroken = workplace.trainer(cls, plans=plans)
    unbroken.run_training()
    finals = [torch.load(f"{unbroken.output_folder}/checkpoint_final.pth", weights_only=False)]
    late = states[-3:]
    assert len(states) == settings.epochs and settings.averaged_epochs == 3

    broken = workplace.trainer(cls, plans=plans, fold=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(patch, stop)
        broken.run_training()
    monkeypatch.delenv("nnssl_settings")
    for file in ("checkpoint_latest.pth", "checkpoint_final.pth"):  # the second time there is nothing left to do
        continued = workplace.trainer(cls, plans=plans + settings.suffix(), fold=1)
        continued.load_checkpoint(f"{broken.output_folder}/{file}")
        continued.run_training()
        finals.append(torch.load(f"{broken.output_folder}/checkpoint_final.pth", weights_only=False))
    assert len(states) == 2 * settings.epochs
    for name, tensor in finals[0]["network_weights"].items():
        mean = torch.stack([state[name] for state in late]).mean(0)
        torch.testing.assert_close(tensor, mean, atol=1e-6, rtol=1e-5, msg=name)
        assert all(torch.equal(tensor, other["network_weights"][name]) for other in finals[1:]), name
        assert torch.equal(tensor, unwrapped(continued.network).state_dict()[name]), "what validation and users get"
    moved = [name for name in late[0] if not torch.equal(late[0][name], late[2][name])]
    assert len(moved) > len(late[0]) / 2
    assert all(final.keys() == finals[0].keys() and averaging.KEY not in final for final in finals)


AVERAGED = "steps=10,epoch_steps=2,lr=0.001,warmup_share=0.2,average_share=0.6"


@pytest.mark.parametrize(
    ("optimizer", "stop"),
    [("sgd", 0), ("adamw", 1), ("sgd", 3)],
    ids=["in the decoder's phase", "before the mean", "within the mean"],
)
def test_a_broken_sawtooth_ends_with_the_mean_of_the_unbroken_ones_late_weights(
    workplace, monkeypatch, fixed_batches, optimizer, stop
):
    monkeypatch.setenv(
        "nnssl_settings", f"schedule=sawtooth,optimizer={optimizer},freeze_share=0.2,loss=dice_topk,{AVERAGED}"
    )
    check_that_a_training_goes_on_as_if_it_had_not_been_broken(
        workplace, monkeypatch, fixed_batches, stop, "nnUNetPlans"
    )


def test_the_mean_is_right_where_the_decoder_holds_the_encoder(
    workplace, monkeypatch, fixed_batches, resenc_checkpoint
):
    monkeypatch.setenv("nnssl_checkpoint", str(resenc_checkpoint))
    monkeypatch.setenv("nnssl_settings", f"recipe=long,{AVERAGED}")
    check_that_a_training_goes_on_as_if_it_had_not_been_broken(
        workplace, monkeypatch, fixed_batches, 3, "nnUNetResEncUNetLPlans"
    )


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["swin", "resenc"])
def test_a_compiled_sawtooth_goes_on_as_if_it_had_not_been_broken(
    workplace, monkeypatch, fixed_batches, compiling, resenc_checkpoint, backbone
):
    plans = "nnUNetPlans"
    if backbone == "resenc":
        plans = "nnUNetResEncUNetLPlans"
        monkeypatch.setenv("nnssl_checkpoint", str(resenc_checkpoint))
    monkeypatch.setenv("nnssl_settings", f"schedule=sawtooth,freeze_share=0.2,{AVERAGED}")
    compiling()
    check_that_a_training_goes_on_as_if_it_had_not_been_broken(workplace, monkeypatch, fixed_batches, 3, plans)


@pytest.mark.parametrize("backbone", ["swin", "resenc"])
def test_a_sawtooth_trains_the_decoder_alone_and_then_both(workplace, monkeypatch, resenc_checkpoint, backbone):
    """A decoder that holds the encoder must not train it."""
    plans = "nnUNetPlans"
    if backbone == "resenc":
        plans = "nnUNetResEncUNetLPlans"
        monkeypatch.setenv("nnssl_checkpoint", str(resenc_checkpoint))
    monkeypatch.setenv("nnssl_settings", "steps=6,epoch_steps=2,schedule=sawtooth,optimizer=sgd,freeze_share=0.5")
    trainer = workplace.trainer(nnUNetTrainerMCLMIM, plans=plans)
    trainer.initialize()
    start = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    decoder = [name for name in start if name.startswith("decoder.") and not name.startswith("decoder.encoder.")]
    encoders = list(train_epochs(trainer, range(2)))
    assert all(torch.equal(tensor, start[f"encoder.{name}"]) for name, tensor in encoders[2].items())
    assert any(not torch.equal(trainer.network.state_dict()[name], start[name]) for name in decoder)
    last = list(train_epochs(trainer, [2]))[-1]
    assert all(not torch.equal(tensor, start[f"encoder.{name}"]) for name, tensor in last.items())
    assert "Step 3: encoder unfrozen" in log_of(trainer)


@pytest.mark.parametrize("schedule", ["warmup", "sawtooth"])
def test_outside_the_papers_schedule_encoder_and_decoder_share_one_rate(workplace, monkeypatch, schedule):
    monkeypatch.setenv("nnssl_settings", f"steps=6,epoch_steps=2,schedule={schedule},lr=0.01,freeze_share=0.5")
    if schedule == "warmup":
        monkeypatch.setenv("nnssl_settings", "steps=6,epoch_steps=2,schedule=warmup,lr=0.01")
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    assert {group["peak_lr"] for group in trainer.optimizer.param_groups} == {0.01}
    if schedule == "warmup":
        before = {name: tensor.clone() for name, tensor in trainer.network.encoder.state_dict().items()}
        after = next(train_epochs(trainer, [0]))
        assert all(not torch.equal(tensor, before[name]) for name, tensor in after.items())
        assert "frozen" not in log_of(trainer)


def test_the_papers_recipe_tells_of_the_long_one(workplace, monkeypatch):
    told = "nnssl_settings=recipe=long"
    assert told in log_of(workplace.trainer(nnUNetTrainerMCLMIM))
    monkeypatch.setenv("nnssl_settings", "recipe=quick")
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    assert told not in log_of(trainer)
    assert "__nnUNetPlans_recipe-quick__" in trainer.output_folder_base
    assert workplace.plans("nnUNetPlans_recipe-quick")["nnunet_ssl"]["settings"]["recipe"] == "quick"


@pytest.mark.parametrize("text", ["loss=dice_topk", "recipe=long"])
def test_a_loss_that_regions_do_not_allow_ends_with_one_line_and_no_folder(
    region_workplace, swin_checkpoint, monkeypatch, results, text
):
    region_workplace.enter(monkeypatch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings=text)
    with pytest.raises(SystemExit, match="loss=dice_topk needs one label") as exit:
        region_workplace.trainer(nnUNetTrainerMCLMIM)
    assert exit.value.code.startswith("error: ") and "\n" not in exit.value.code
    assert not list(results.iterdir())


def initialized(trainer):
    """As nnU-Net has it at the start of a training."""
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    return trainer


@pytest.mark.parametrize(
    ("stop", "decoder"),
    [(1, "random"), (2, "random"), (1, "pretrained"), (2, "unet")],
    ids=["while frozen", "after the unfreeze", "with a decoder from the checkpoint", "with a U-Net's decoder"],
)
def test_a_continued_training_equals_the_unbroken_one(workplace, monkeypatch, masked_checkpoints, stop, decoder):
    suffix = "" if decoder == "random" else f"_decoder-{decoder}"
    monkeypatch.setenv("nnssl_settings", f"{STEPS},decoder={decoder}")
    monkeypatch.setenv("nnssl_checkpoint", str(masked_checkpoints["swin"]))
    unbroken = initialized(workplace.trainer(nnUNetTrainerMCLMIM))
    expected = list(train_epochs(unbroken, range(3)))[-1] | unbroken.network.state_dict()

    first = initialized(workplace.trainer(nnUNetTrainerMCLMIM, fold=1))
    list(train_epochs(first, range(stop)))
    first.current_epoch = stop - 1
    workplace.save_model(first)
    monkeypatch.setenv("nnssl_checkpoint", "/nowhere")
    monkeypatch.delenv("nnssl_settings")
    plans = f"nnUNetPlans_steps6_epoch2_freeze0.5_lr0.01{suffix}"
    second = workplace.trainer(nnUNetTrainerMCLMIM, plans=plans, fold=1)
    second.load_checkpoint(f"{first.output_folder}/checkpoint_latest.pth")
    second.set_deep_supervision_enabled(second.enable_deep_supervision)
    assert second.current_epoch == stop and second.enable_deep_supervision == (decoder == "unet")
    list(train_epochs(second, range(stop, 3)))
    for name, tensor in second.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert second.plans_manager.plans["nnunet_ssl"] == first.plans_manager.plans["nnunet_ssl"]


@pytest.fixture
def compiling(monkeypatch):
    """A function that turns nnU-Net's compilation on, as on a GPU, with a backend that takes seconds."""
    compile_whole, compile_module = torch.compile, torch.nn.Module.compile

    def switch_on():
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda trainer: True)
        monkeypatch.setattr(torch, "compile", functools.partial(compile_whole, backend="aot_eager"))
        monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend="aot_eager"))

    yield switch_on
    torch.compiler.reset()


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("backbone", ["swin", "resenc"])
def test_a_compiled_training_is_the_plain_one_across_the_unfreeze_and_a_restart(
    workplace, compiling, resenc_checkpoint, monkeypatch, backbone
):
    plans = "nnUNetPlans"
    if backbone == "resenc":
        plans = "nnUNetResEncUNetLPlans"
        monkeypatch.setenv("nnssl_checkpoint", str(resenc_checkpoint))
    monkeypatch.setenv("nnssl_settings", STEPS.replace("lr=0.01", "lr=0.0001"))  # so that rounding stays rounding
    plain = workplace.trainer(nnUNetTrainerMCLMIM, plans=plans)
    plain.initialize()
    expected = list(train_epochs(plain, range(3)))

    compiling()
    first = workplace.trainer(nnUNetTrainerMCLMIM, plans=plans, fold=1)
    first.initialize()
    assert isinstance(first.network, OptimizedModule) == (backbone == "resenc")
    states = list(train_epochs(first, range(2)))
    first.current_epoch = 1
    workplace.save_model(first)
    second = workplace.trainer(nnUNetTrainerMCLMIM, plans=plans, fold=1)
    second.load_checkpoint(f"{first.output_folder}/checkpoint_latest.pth")
    states += train_epochs(second, range(2, 3))
    for state, reference in zip(states, expected, strict=True):
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, reference[name], atol=2e-6, rtol=0, msg=name)
    frozen, trained = states[first.schedule.freeze_steps - 1], states[-1]
    assert not any(torch.equal(tensor, frozen[name]) for name, tensor in trained.items())


@pytest.mark.parametrize("scratch", [False, True])
def test_a_training_that_would_not_move_the_encoder_ends_with_one_sentence(workplace, monkeypatch, scratch):
    """As under a compiler that goes on with the frozen encoder's graph."""
    trainer = workplace.trainer(nnUNetTrainerSwinFPNScratch if scratch else nnUNetTrainerMCLMIM)
    trainer.initialize()
    trainer.network.encoder.forward = torch.no_grad()(trainer.network.encoder.forward)
    with pytest.raises(
        SystemExit, match=r"\d+ of the \d+ tensors of the encoder received no gradient, such as "
    ) as exit:
        list(train_epochs(trainer, range(3)))
    assert trainer.current_epoch * 2 + trainer.step_in_epoch - 1 == trainer.schedule.freeze_steps
    assert "\n" not in exit.value.code and "nnUNet_compile" in exit.value.code


def test_equal_channels_give_the_features_of_one(region_workplace, workplace, swin_checkpoint, monkeypatch, results):
    region_workplace.enter(monkeypatch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings=STEPS)
    trainer = region_workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    assert trainer.num_input_channels == 3
    pretrained = read_checkpoint(swin_checkpoint)
    single = build_encoder(pretrained.architecture)
    single.load_state_dict(pretrained.tensors)
    x = torch.randn(1, 1, 16, 20, 16)
    for ours, theirs in zip(trainer.network.encoder(x.expand(-1, 3, -1, -1, -1)), single(x)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_regions_train_with_three_channels(region_workplace, swin_checkpoint, monkeypatch, results):
    region_workplace.enter(monkeypatch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings=STEPS)
    trainer = region_workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    list(train_epochs(trainer, range(2)))
    assert type(trainer.loss).__name__ == "DC_and_BCE_loss"
    assert trainer.network(batch_for(trainer, 0)["data"]).shape[1] == 2


@pytest.mark.parametrize("loss", ["dice_ce", "dice_topk"])
def test_ignored_voxels_give_no_gradient(workplace, monkeypatch, loss):
    monkeypatch.setenv("nnssl_settings", f"{STEPS},loss={loss}")
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.dataset_json["labels"]["ignore"] = 2
    trainer.label_manager = trainer.plans_manager.get_label_manager(trainer.dataset_json)
    trainer.initialize()
    batch = batch_for(trainer, 0)
    logits = trainer.network(batch["data"]).detach().requires_grad_()
    trainer.loss(logits, batch["target"]).backward()
    ignored = (batch["target"] == 2).expand_as(logits)
    assert logits.shape[1] == 2
    assert (logits.grad[ignored] == 0).all() and (logits.grad[~ignored] != 0).any()


def test_3d_lowres_trains_with_its_own_batch_dice(workplace):
    trainer = workplace.trainer(nnUNetTrainerMCLMIM, configuration="3d_lowres")
    trainer.initialize()
    list(train_epochs(trainer, [1]))
    assert trainer.loss.dc.batch_dice
    assert trainer.output_folder_base.endswith("__3d_lowres")


def test_the_scratch_twin_has_the_same_network_and_decoder_but_moves_from_the_first_step(workplace, swin_checkpoint):
    trainer, twin = (workplace.trainer(cls) for cls in (nnUNetTrainerMCLMIM, nnUNetTrainerSwinFPNScratch))
    trainer.initialize()
    twin.initialize()
    for name, tensor in twin.network.decoder.state_dict().items():
        assert torch.equal(tensor, trainer.network.decoder.state_dict()[name]), name
    before = {name: tensor.clone() for name, tensor in twin.network.encoder.state_dict().items()}
    assert not torch.equal(
        before["patch_embed.proj.weight"], read_checkpoint(swin_checkpoint).tensors["patch_embed.proj.weight"]
    )
    after = next(train_epochs(twin, [0]))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert {group["lr"] for group in twin.optimizer.param_groups} == {0.01}


def test_without_a_checkpoint_the_twin_has_the_papers_encoder(workplace, monkeypatch):
    monkeypatch.delenv("nnssl_checkpoint")
    twin = workplace.trainer(nnUNetTrainerSwinFPNScratch)
    twin.initialize()
    assert sum(parameter.numel() for parameter in twin.network.encoder.parameters()) == 20_525_202 - 48


def test_a_residual_checkpoint_trains_nnunets_network_with_deep_supervision(workplace, resenc_checkpoint, monkeypatch):
    monkeypatch.setenv("nnssl_checkpoint", str(resenc_checkpoint))
    trainer = workplace.trainer(nnUNetTrainerMCLMIM, plans="nnUNetResEncUNetLPlans")
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    pretrained = read_checkpoint(resenc_checkpoint).tensors
    states = list(train_epochs(trainer, range(3)))
    assert type(trainer.network).__name__ == "ResidualEncoderUNet"
    assert type(trainer.loss).__name__ == "DeepSupervisionWrapper"
    shared = [name for name in states[0] if name in pretrained and states[0][name].shape == pretrained[name].shape]
    assert len(shared) > 20
    assert all(torch.equal(states[2][name], pretrained[name]) for name in shared)
    assert any(not torch.equal(states[5][name], pretrained[name]) for name in shared)
    assert "follows the checkpoint's backbone" not in log_of(trainer)


@pytest.mark.parametrize("backbone", ["swin", "resenc"])
@pytest.mark.parametrize("plans", ["nnUNetPlans", "nnUNetResEncUNetLPlans"])
def test_the_decoder_goes_on_from_masked_modelling_but_for_its_head(
    workplace, masked_checkpoints, monkeypatch, backbone, plans
):
    monkeypatch.setenv("nnssl_checkpoint", str(masked_checkpoints[backbone]))
    monkeypatch.setenv("nnssl_settings", f"{STEPS},decoder=pretrained")
    trainer = initialized(workplace.trainer(nnUNetTrainerMCLMIM, plans=plans))
    held, own = read_checkpoint(masked_checkpoints[backbone]).decoder, trainer.network.decoder.state_dict()
    body = [name for name in held if not name.startswith("head.")]
    assert len(body) == len(held) - 2 > 3 and own["head.weight"].shape != held["head.weight"].shape
    assert all(torch.equal(own[name], held[name]) for name in body)
    log = log_of(trainer)
    assert f"100.0% of the decoder loaded\n  loaded: {len(body)}\n" in log
    assert "  excluded: 2\n    head.weight\n    head.bias" in log
    assert trainer.plans_manager.plans["nnunet_ssl"]["pretrained"]["decoder_loaded_fraction"] == 1
    before = {name: own[name].clone() for name in body}
    list(train_epochs(trainer, range(1)))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in own.items() if name in before)


@pytest.mark.parametrize("asked", [None, False])
@pytest.mark.parametrize("patch_size", ["32x16x16", "28x19x24"])
def test_a_unets_decoder_is_supervised_at_all_its_scales_unless_that_is_turned_off(
    workplace, monkeypatch, asked, patch_size
):
    settings = f"{STEPS},decoder=unet,patch_size={patch_size}" + ("" if asked is None else ",deep_supervision=false")
    monkeypatch.setenv("nnssl_settings", settings)
    trainer = initialized(workplace.trainer(nnUNetTrainerMCLMIM))
    assert isinstance(trainer.network, SwinUNet)
    batch = batch_for(trainer, 0)
    outputs = trainer.network(batch["data"])
    if asked is None:
        assert [output.shape[2:] for output in outputs] == [target.shape[2:] for target in batch["target"]]
        assert len(outputs) == 5 == len(trainer.loss.weight_factors)
    else:
        assert outputs.shape[2:] == batch["target"].shape[2:]
    trainer.train_step(batch)
    unused = [name for name, p in trainer.network.decoder.named_parameters() if p.requires_grad and p.grad is None]
    zero_weight = [name for name, _ in trainer.network.decoder.named_parameters() if name.startswith("seg_layers.0.")]
    assert unused == ([] if asked is not None else zero_weight), "DistributedDataParallel would wait for them"


def test_the_scratch_twin_takes_a_unets_decoder_and_the_papers_encoder(workplace, monkeypatch):
    monkeypatch.delenv("nnssl_checkpoint")
    monkeypatch.setenv("nnssl_settings", f"{STEPS},decoder=unet")
    twin = workplace.trainer(nnUNetTrainerSwinFPNScratch)
    twin.initialize()
    assert isinstance(twin.network, SwinUNet) and twin.network.encoder.channels == (48, 96, 192, 384, 768)


def test_resenc_plans_look_for_a_residual_pre_training_first(workplace, resenc_checkpoint, monkeypatch, results):
    monkeypatch.delenv("nnssl_checkpoint")
    for run in ("mcl_mim", "mcl_mim_resenc"):
        shutil.copytree(resenc_checkpoint.parent, results / "Dataset500_FOMO60K" / run)
    for plans, run in (("nnUNetResEncUNetLPlans", "mcl_mim_resenc"), ("nnUNetPlans", "mcl_mim")):
        trainer = workplace.trainer(nnUNetTrainerMCLMIM, plans=plans)
        trainer.initialize()
        assert f"Dataset500_FOMO60K/{run}/encoder.safetensors" in log_of(trainer)


@pytest.mark.parametrize(
    ("checkpoint", "plans", "network"),
    [
        ("swin", "nnUNetResEncUNetLPlans", "SwinFPN instead of the plans' ResidualEncoderUNet"),
        ("resenc", "nnUNetPlans", "ResidualEncoderUNet instead of the plans' PlainConvUNet"),
    ],
)
def test_the_network_follows_the_checkpoint_and_says_so(
    workplace, swin_checkpoint, resenc_checkpoint, monkeypatch, checkpoint, plans, network
):
    monkeypatch.setenv("nnssl_checkpoint", str({"swin": swin_checkpoint, "resenc": resenc_checkpoint}[checkpoint]))
    trainer = workplace.trainer(nnUNetTrainerMCLMIM, plans=plans)
    trainer.initialize()
    assert network in log_of(trainer)
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    list(train_epochs(trainer, range(2)))


PREDICTED = {
    "swin": ("swin", "random", SwinFPN),
    "swin's U-Net": ("swin", "unet", SwinUNet),
    "resenc's FPN": ("resenc", "pretrained", ResEncFPN),
}


@pytest.mark.parametrize(("backbone", "decoder", "network"), PREDICTED.values(), ids=PREDICTED)
def test_prediction_needs_neither_the_checkpoint_nor_the_settings(
    workplace, monkeypatch, masked_checkpoints, backbone, decoder, network
):
    monkeypatch.setenv("nnssl_settings", f"{STEPS},decoder={decoder}")
    monkeypatch.setenv("nnssl_checkpoint", str(masked_checkpoints[backbone]))
    trainer = initialized(workplace.trainer(nnUNetTrainerMCLMIM))
    list(train_epochs(trainer, range(1)))
    trainer.set_deep_supervision_enabled(False)
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    workplace.save_model(trainer, "checkpoint_final.pth")
    for variable in ("nnssl_checkpoint", "nnssl_settings", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable)
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, use_gaussian=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, use_folds=(0,))
    assert isinstance(predictor.network, network)
    x = torch.randn(1, *trainer.configuration_manager.patch_size)
    trainer.network.eval()
    with torch.no_grad():
        expected = trainer.network(x[None])[0]
    np.testing.assert_allclose(predictor.predict_sliding_window_return_logits(x), expected, atol=1e-2)


def test_settings_are_recorded_in_the_plans_the_name_and_the_checkpoint(workplace, swin_checkpoint):
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    workplace.save_model(trainer)
    name = "nnUNetPlans_steps6_epoch2_freeze0.5_lr0.01"
    assert f"nnUNetTrainerMCLMIM__{name}__3d_fullres" in trainer.output_folder_base
    offered = workplace.plans(name)
    assert offered["plans_name"] == name and offered["nnunet_ssl"]["settings"]["steps"] == 6
    assert offered["configurations"] == workplace.plans()["configurations"], "the planned network stays there"
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_latest.pth", weights_only=False)
    recorded = checkpoint["init_args"]["plans"]["nnunet_ssl"]
    assert recorded["settings"]["freeze_share"] == 0.5
    assert recorded["pretrained"] == {
        **source_of(swin_checkpoint),
        "origin": "nnunet_ssl",
        "method": "mcl_mim",
        "step": 7,
        "loaded_fraction": 1.0,
    }


def test_nnunets_prediction_looks_for_default_settings_where_the_training_puts_them(workplace, monkeypatch):
    monkeypatch.delenv("nnssl_settings")
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    assert trainer.output_folder_base == get_output_folder(701, "nnUNetTrainerMCLMIM", "nnUNetPlans", "3d_fullres")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.schedule.freeze_steps) == (20, 250, 1500)


def test_a_fraction_changes_the_training_cases_and_not_the_validation(workplace, monkeypatch):
    splits = {}
    for fraction in (100, 50, 25):
        monkeypatch.setenv("nnssl_settings", f"fraction={fraction}")
        splits[fraction] = workplace.trainer(nnUNetTrainerMCLMIM).do_split()
    assert [len(train) for train, _ in splits.values()] == [4, 2, 1]
    assert set(splits[25][0]) < set(splits[50][0]) < set(splits[100][0])
    assert splits[25][1] == splits[50][1] == splits[100][1]


def test_a_fold_of_another_network_is_not_put_beside_the_others(workplace, resenc_checkpoint, monkeypatch):
    trainer = workplace.trainer(nnUNetTrainerSwinFPNScratch)
    trainer.initialize()
    workplace.save_model(trainer, "checkpoint_final.pth")
    monkeypatch.setenv("nnssl_checkpoint", str(resenc_checkpoint))
    other = workplace.trainer(nnUNetTrainerSwinFPNScratch, fold=1)
    with pytest.raises(SystemExit, match="holds fold_0 of another network"):
        other.initialize()


def test_another_checkpoint_needs_a_name_of_its_own(workplace, swin_checkpoint, monkeypatch, tmp_path):
    trainer = workplace.trainer(nnUNetTrainerSSL)
    trainer.initialize()
    workplace.save_model(trainer, "checkpoint_final.pth")
    moved = shutil.copy(swin_checkpoint, tmp_path / "moved.safetensors")
    monkeypatch.setenv("nnssl_checkpoint", str(moved))
    for fold in (0, 1):  # the same bytes elsewhere are the same checkpoint, and a fold may begin anew, as in nnU-Net
        workplace.trainer(nnUNetTrainerSSL, fold=fold).initialize()

    pretrained = read_checkpoint(swin_checkpoint)
    other = tmp_path / "other.safetensors"
    rest = {"architecture": pretrained.architecture, "preprocessing": {}, "metadata": {}}
    write_encoder(other, pretrained.tensors, method="cl", step=8, **rest)
    monkeypatch.setenv("nnssl_checkpoint", str(other))
    for fold in (0, 1):
        with pytest.raises(SystemExit, match=r"holds fold_0 from another checkpoint .*nnssl_settings=name=") as refused:
            workplace.trainer(nnUNetTrainerSSL, fold=fold).initialize()
        assert str(swin_checkpoint) in refused.value.code and str(other) in refused.value.code
    monkeypatch.setenv("nnssl_settings", f"{STEPS},name=other")
    named = workplace.trainer(nnUNetTrainerSSL)
    named.initialize()
    assert named.plans_manager.plans["nnunet_ssl"]["pretrained"]["file"] == str(other)
    assert "_name-other__" in named.output_folder_base


@pytest.fixture
def monai_file(tmp_path, monkeypatch):
    """A state dict of MONAI's SwinUNETR that trainers start from; nothing in it tells its merging."""
    state = foreign.monai_encoder(embed_dim=6, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=3).state_dict()
    torch.save({"state_dict": {f"swinViT.{name}": tensor for name, tensor in state.items()}}, tmp_path / "model.pt")
    monkeypatch.setenv("nnssl_checkpoint", str(tmp_path / "model.pt"))
    return tmp_path / "model.pt"


def test_a_merging_that_no_file_tells_is_asked_for_and_kept_in_the_plans(workplace, monai_file, monkeypatch):
    with pytest.raises(SystemExit, match=r"nnssl_settings=merging="):
        workplace.trainer(nnUNetTrainerSSL).initialize()
    monkeypatch.setenv("nnssl_settings", f"{STEPS},merging=monai_1.4")
    trainer = workplace.trainer(nnUNetTrainerSSL)
    trainer.initialize()
    assert trainer.network.encoder.stages[0].merging.octants == MERGINGS["monai_1.4"]
    assert trainer.configuration_manager.configuration["architecture"]["arch_kwargs"]["merging"] == "monai_1.4"
    assert "_merging-monai_1.4__" in trainer.output_folder_base
    workplace.save_model(trainer)
    monkeypatch.delenv("nnssl_settings")
    plans = Path(trainer.output_folder_base).name.split("__")[1]
    again = workplace.trainer(nnUNetTrainerSSL, plans=plans)
    again.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert again.network.encoder.stages[0].merging.octants == MERGINGS["monai_1.4"]


def test_what_is_assumed_of_a_checkpoint_stands_in_the_log(workplace, monai_file, monkeypatch):
    known = monai_file.rename(monai_file.with_name("model_swinvit.pt"))
    monkeypatch.setenv("nnssl_checkpoint", str(known))
    trainer = workplace.trainer(nnUNetTrainerSSL)
    trainer.initialize()
    assert "WARNING: assumed of the checkpoint: merging monai_1.4 " in log_of(trainer)


def test_the_stem_of_several_channels_is_averaged_and_the_log_says_so(
    workplace, write_checkpoint, swin_checkpoint, tmp_path, monkeypatch
):
    architecture = read_checkpoint(swin_checkpoint).architecture | {"in_channels": 4}
    path = write_checkpoint(tmp_path, architecture)
    monkeypatch.setenv("nnssl_checkpoint", str(path))
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    expected = read_checkpoint(path).tensors["patch_embed.proj.weight"].mean(dim=1, keepdim=True)
    torch.testing.assert_close(trainer.network.encoder.patch_embed.proj.weight.detach(), expected)
    assert "patch_embed.proj.weight: averaged over the file's 4 channels" in log_of(trainer)


def test_an_epoch_whose_losses_are_all_not_finite_ends_the_training(workplace):
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    lost = [{"loss": np.array(number, np.float32)} for number in (np.nan, np.inf)]
    trainer.on_train_epoch_end([*lost, {"loss": np.array(0.5, np.float32)}])
    with pytest.raises(SystemExit, match="not finite in any step of epoch 0"):
        trainer.on_train_epoch_end(lost)


def test_the_log_says_what_prediction_needs(workplace):
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    name = trainer.plans_manager.plans_name
    assert f"need -p {name}, nnUNetv2_predict among them" in log_of(trainer)


def test_an_arm_says_when_its_checkpoint_is_of_another_recipe(workplace):
    for arm, warned in ((nnUNetTrainerMCLMIM, False), (nnUNetTrainerMIM, True)):
        trainer = workplace.trainer(arm)
        trainer.initialize()
        assert ("starts from a pre-training by mcl_mim" in log_of(trainer)) == warned


def test_a_continued_training_knows_the_best_epoch_so_far(workplace):
    """nnU-Net writes the checkpoint of an epoch before it finds out that the epoch was the best."""
    first = workplace.trainer(nnUNetTrainerMCLMIM)
    first.initialize()
    first._best_ema = 0.25
    for epoch, dice in enumerate((0.25, 0.75)):
        first.logger.log("mean_fg_dice", dice, epoch)
    workplace.save_model(first)
    second = workplace.trainer(nnUNetTrainerMCLMIM)
    second.load_checkpoint(f"{first.output_folder}/checkpoint_latest.pth")
    assert second._best_ema == max(first.logger.get_value("ema_fg_dice", step=None)) > 0.25


def test_a_patch_that_residual_strides_do_not_divide_is_refused_with_the_nearest(
    workplace, resenc_checkpoint, monkeypatch
):
    monkeypatch.setenv("nnssl_checkpoint", str(resenc_checkpoint))
    monkeypatch.setenv("nnssl_settings", f"{STEPS},patch_size=18x20x24")
    trainer = workplace.trainer(nnUNetTrainerMCLMIM, plans="nnUNetResEncUNetLPlans")
    with pytest.raises(SystemExit, match="the nearest is patch_size=16x20x24"):
        trainer.initialize()


def test_weights_that_fill_too_little_of_the_encoder_are_refused(workplace, tmp_path, monkeypatch, write_checkpoint):
    other = {"backbone": "resenc", "in_channels": 1, "features": [2, 3, 5], "blocks": [1, 1, 1]}
    monkeypatch.setenv("nnssl_checkpoint", str(write_checkpoint(tmp_path, other)))
    trainer = workplace.trainer(nnUNetTrainerMCLMIM, plans="nnUNetResEncUNetLPlans")
    with pytest.raises(SystemExit, match="less than the 50%"):
        trainer.initialize()


@pytest.mark.parametrize(
    ("trainer", "configuration", "variables", "message"),
    [
        (nnUNetTrainerMCLMIM, "2d", {}, "not 2d"),
        (nnUNetTrainerMCLMIM, "3d_cascade_fullres", {}, "second stage of a cascade"),
        (nnUNetTrainerMIM, "3d_fullres", {}, "nnUNetTrainerMIM needs a finished pre-training"),
        (nnUNetTrainerSSL, "3d_fullres", {}, "none was named"),
        (nnUNetTrainerMCLMIM, "3d_fullres", {"nnssl_settings": "stepz=3"}, "did you mean 'steps'?"),
        (nnUNetTrainerMCLMIM, "3d_fullres", {"nnUNet_results": ""}, "nnUNet_results is not set"),
    ],
)
def test_a_mistake_ends_with_one_line_and_no_folder(
    workplace, monkeypatch, results, trainer, configuration, variables, message
):
    monkeypatch.delenv("nnssl_checkpoint")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit:
        workplace.trainer(trainer, configuration)
    assert exit.value.code.startswith("error: ") and message in exit.value.code and "\n" not in exit.value.code
    assert not list(results.iterdir())


@pytest.mark.parametrize(
    ("checkpoint", "trainer", "settings", "message"),
    [
        ("swin", nnUNetTrainerMCLMIM, "decoder=pretrained", "holds no decoder that could be loaded"),
        ("resenc", nnUNetTrainerMCLMIM, "decoder=pretrained", "holds no decoder that could be loaded"),
        ("resenc", nnUNetTrainerMCLMIM, "decoder=unet", "decoder=unet is a choice for Swin encoders"),
        ("resenc", nnUNetTrainerSwinFPNScratch, "decoder=unet", "decoder=unet is a choice for Swin encoders"),
        ("swin", nnUNetTrainerSwinFPNScratch, "decoder=pretrained", "starts from random weights"),
        ("swin", nnUNetTrainerMCLMIM, "deep_supervision=true", "the FPN decoder has one output"),
        ("swin", nnUNetTrainerSwinFPNScratch, "deep_supervision=true", "the FPN decoder has one output"),
        ("masked", nnUNetTrainerMCLMIM, "decoder=pretrained,deep_supervision=true", "the FPN decoder has one output"),
        ("swin", nnUNetTrainerMCLMIM, "decoder=unet,patch_size=16x16x8", "does not suit decoder=unet"),
    ],
)
def test_a_decoder_that_cannot_be_had_ends_with_one_line_and_no_folder(
    workplace, swin_checkpoint, resenc_checkpoint, masked_checkpoints, monkeypatch, results,
    checkpoint, trainer, settings, message,
):  # fmt: skip
    files = {"swin": swin_checkpoint, "resenc": resenc_checkpoint, "masked": masked_checkpoints["resenc"]}
    monkeypatch.setenv("nnssl_checkpoint", str(files[checkpoint]))
    monkeypatch.setenv("nnssl_settings", settings)
    plans = set(workplace.preprocessed.glob("*.json"))
    with pytest.raises(SystemExit) as exit:
        workplace.trainer(trainer)
    assert exit.value.code.startswith("error: ") and message in exit.value.code and "\n" not in exit.value.code
    assert not list(results.iterdir()) and set(workplace.preprocessed.glob("*.json")) == plans


def test_an_old_pytorch_is_refused_before_anything_is_made(workplace, monkeypatch, results, installed):
    monkeypatch.syspath_prepend(installed("torch", "2.5.1"))
    with pytest.raises(SystemExit, match=r"^error: nnunet_ssl needs torch.* not torch 2\.5\.1; run: "):
        workplace.trainer(nnUNetTrainerMCLMIM)
    assert not list(results.iterdir())
