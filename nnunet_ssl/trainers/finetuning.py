"""Fine-tuning as a stock nnU-Net trainer: an encoder from a checkpoint, a decoder around it, a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.file_path_utilities import convert_trainer_plans_config_to_identifier
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nnunet_ssl.architectures.backbones import backbone_of
from nnunet_ssl.architectures.channels import with_any_channels
from nnunet_ssl.architectures.compiling import Divisible, compile_parts, forget_compiled
from nnunet_ssl.architectures.networks import PAPER_ENCODER
from nnunet_ssl.console import exit_on_user_error
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import remove_leftovers, written_beside
from nnunet_ssl.learning import check_gradients
from nnunet_ssl.nnunet_folders import channel_names, folder_of
from nnunet_ssl.requirements import check_requirements
from nnunet_ssl.trainers.averaging import add_average, saved_average, with_weights_of
from nnunet_ssl.trainers.channels import ChannelSubsets, check_channels, way_of
from nnunet_ssl.trainers.checkpoints import explicit_checkpoint, find_checkpoint
from nnunet_ssl.trainers.fractions import nested_subset
from nnunet_ssl.trainers.freezing import encoder_of, unwrapped, with_own_buffers, with_trainable_encoder
from nnunet_ssl.trainers.gpu_augmentation import AugmentsOnDevice, check_augmentation
from nnunet_ssl.trainers.losses import check_loss, with_hardest_voxels
from nnunet_ssl.trainers.networks import has_deep_supervision, network_entry, network_of, plans_residual_unet
from nnunet_ssl.trainers.optimization import GRADIENT_CLIP, StepSchedule, build_optimizer, refuse_lost_epoch
from nnunet_ssl.trainers.plans import (
    SECTION,
    check_configuration,
    offer_plans,
    plans_with_settings,
    refuse_stale,
    saved_plans,
)
from nnunet_ssl.trainers.provenance import refuse_to_mix, source_of
from nnunet_ssl.trainers.schedules import Schedule
from nnunet_ssl.trainers.settings import Settings
from nnunet_ssl.weights.encoders import PretrainedEncoder, load_decoder, load_encoder, read_checkpoint


class nnUNetTrainerSSL(AugmentsOnDevice):
    """Fine-tune a pre-trained encoder; every arm is this class with another `recipe`.

    The network and the settings go into the plans, so prediction needs neither the checkpoint nor the environment of
    the training.

    Attributes:
        recipe: the pre-training whose newest checkpoint is taken when ``nnssl_checkpoint`` names none.
        from_scratch: start from random weights and freeze nothing.
    """

    recipe: str | None = None
    from_scratch = False
    network: nn.Module

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        with exit_on_user_error():
            check_requirements()
            self.settings = Settings.of_plans(plans).updated_from_environment()
            given, plans = plans["plans_name"], plans_with_settings(plans, self.settings)
            check_configuration(plans, configuration)
            self.augments_on_device = self.settings.augmentation == "gpu"
            if self.augments_on_device:
                check_augmentation(type(self), plans, configuration, device)
            schemes = PlansManager(plans).get_configuration(configuration).normalization_schemes
            check_channels(self.settings, channel_names(dataset_json), schemes)
            check_loss(self.settings.loss, PlansManager(plans).get_label_manager(dataset_json))
            folder = _model_folder(type(self).__name__, plans, configuration)
            if not any(folder.glob(f"fold_{fold}/checkpoint_*.pth")):
                refuse_stale(plans, configuration, folder_of("nnUNet_preprocessed") / plans["dataset_name"])
                self._check_network(plans, configuration)  # what is wrong is reported before any folder is made
            if plans["plans_name"] != given:
                offer_plans(plans, folder_of("nnUNet_preprocessed") / plans["dataset_name"])
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = min(self.settings.epoch_steps, self.settings.steps)
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)
        self.num_epochs = self.settings.epochs
        self.schedule = Schedule.of_settings(self.settings, from_scratch=self.from_scratch)
        self.initial_lr = self.settings.lr
        self.oversample_foreground_percent = 0.5  # one patch around a lesion for each one drawn anywhere
        self.save_every = 1
        self.resuming = False
        self.encoder_trainable = True
        self.encoder_checked = False
        self.step_in_epoch = 0
        self.average: AveragedModel | None = None
        self.subsets: ChannelSubsets | None = None
        if self.settings.suffix():
            self.print_to_log_file(
                f"Settings are in the plans, so nnU-Net's other commands need -p {plans['plans_name']}, "
                "nnUNetv2_predict among them: without it they take another model or find none."
            )
        if self.settings.recipe == "paper":
            self.print_to_log_file(
                "This is the paper's short recipe; nnssl_settings=recipe=long trains as long as nnU-Net and freezes "
                "nothing (docs/how-to/fine-tune.md)."
            )

    # ---- network and weights -----------------------------------------------------------------------------------------

    def initialize(self) -> None:
        with exit_on_user_error():
            if self.resuming:
                self._build(self._saved_network())
                return
            path = self._find_checkpoint(self.plans_manager.plans)
            pretrained = self._read_checkpoint(path) if path else None
            source = source_of(path) if path and not self.from_scratch else {}
            entry = with_any_channels(self._choose_network(pretrained), way_of(self.settings))
            refuse_to_mix(Path(self.output_folder_base), self.fold, self.configuration_name, entry, source)
            self._build(entry)
            if pretrained and source:
                self._load_weights(pretrained, source, entry)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        self.resuming = not self.was_initialized
        super().load_checkpoint(filename_or_checkpoint)
        if self.settings.averaged_epochs:
            self.average = saved_average(filename_or_checkpoint, unwrapped(self.network))
        # nnU-Net writes a checkpoint before it compares the epoch with the best one, so the stored figure is too old.
        self._best_ema = max(self.logger.get_value("ema_fg_dice", step=None), default=None)

    def _build(self, entry: dict[str, Any]) -> None:
        """Build the network of a plans' entry, with optimiser, loss and what else a training takes."""
        self.plans_manager.plans["configurations"][self.configuration_name]["architecture"] = entry
        self.configuration_manager.configuration["architecture"] = entry
        self.enable_deep_supervision = has_deep_supervision(entry, self.settings.deep_supervision)
        if self.is_ddp:
            torch._dynamo.config.optimize_ddp = False  # older PyTorch can't split graphs with autograd functions
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            super().initialize()
        self.network = with_own_buffers(self.network)
        network = unwrapped(self.network)
        if super()._do_i_compile() and isinstance(network, Divisible):
            self.print_to_log_file("Using torch.compile for the parts of the network...")
            compile_parts(network)

    def _do_i_compile(self) -> bool:
        """Tell nnU-Net whether to compile the whole network: not one that lists its parts."""
        return super()._do_i_compile() and not isinstance(unwrapped(self.network), Divisible)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        super().set_deep_supervision_enabled(enabled)
        if self.enable_deep_supervision:
            forget_compiled()  # or a network compiled with all its outputs may go on giving them

    def _saved_network(self) -> dict[str, Any]:
        """Take over what the interrupted training recorded, and return the entry of its network."""
        saved = saved_plans(self.output_folder_base)
        self.plans_manager.plans[SECTION] = saved[SECTION]
        return saved["configurations"][self.configuration_name]["architecture"]

    def _find_checkpoint(self, plans: dict[str, Any]) -> Path | None:
        if self.from_scratch:
            return explicit_checkpoint()
        return find_checkpoint(self.recipe, type(self).__name__, residual=plans_residual_unet(plans))

    def _read_checkpoint(self, path: Path) -> PretrainedEncoder:
        use = "Taking the network's sizes, not its weights, from" if self.from_scratch else "Pre-trained encoder:"
        self.print_to_log_file(f"{use} {path}")
        return read_checkpoint(path, merging=self.settings.merging)

    def _check_network(self, plans: dict[str, Any], configuration: str) -> None:
        """Find the checkpoint; where the settings ask for more than it always has, see that it, or its backbone, does.

        Raises:
            UserError: there is no checkpoint, or no such decoder.
        """
        path = self._find_checkpoint(plans)
        if self.settings.decoder == "pretrained" and self.from_scratch:
            raise UserError(f"decoder=pretrained, and {type(self).__name__} starts from random weights: leave it out.")
        if self.settings.decoder != "random" or self.settings.deep_supervision is not None:
            pretrained = read_checkpoint(path, merging=self.settings.merging) if path else None
            entry = self._network_entry(pretrained, PlansManager(plans).get_configuration(configuration))
            has_deep_supervision(entry, self.settings.deep_supervision)

    def _network_entry(
        self, pretrained: PretrainedEncoder | None, configuration: ConfigurationManager
    ) -> dict[str, Any]:
        """The entry of the network that the settings ask for, around the checkpoint's encoder or the paper's."""
        architecture, held = (pretrained.architecture, pretrained.decoder) if pretrained else (PAPER_ENCODER, {})
        planned = configuration.configuration["architecture"]
        entry = network_entry(architecture, planned, self.settings.decoder, held)
        network_of(backbone_of(architecture["backbone"]), entry).check_patch(configuration.patch_size, entry)
        return entry

    def _choose_network(self, pretrained: PretrainedEncoder | None) -> dict[str, Any]:
        """Build around the checkpoint's backbone, whatever network the plans were made for, and say so."""
        planned = self.configuration_manager.configuration["architecture"]
        entry = self._network_entry(pretrained, self.configuration_manager)
        backbone = backbone_of((pretrained.architecture if pretrained else PAPER_ENCODER)["backbone"])
        if _class_name(entry) != _class_name(planned):
            self.print_to_log_file(
                f"The network follows the checkpoint's backbone, {backbone.name}: "
                f"{_class_name(entry)} instead of the plans' {_class_name(planned)}. Patch, batch and spacing stay."
            )
        if backbone.recipe not in (None, self.settings.recipe):
            self.print_to_log_file(
                f"The authors of {backbone.name} fine-tune it with another optimizer, clipping and schedule: "
                f"nnssl_settings=recipe={backbone.recipe}"
            )
        return entry

    def _load_weights(self, pretrained: PretrainedEncoder, source: dict[str, str], entry: dict[str, Any]) -> None:
        self.print_to_log_file(f"origin {pretrained.origin}, method {pretrained.method}, step {pretrained.step}")
        if self.recipe and not pretrained.may_be_of(self.recipe):
            self.print_to_log_file(f"WARNING: {type(self).__name__} starts from a pre-training by {pretrained.method}.")
        for key, why in pretrained.assumed.items():
            self.print_to_log_file(f"WARNING: assumed of the checkpoint: {key} {pretrained.architecture[key]} ({why})")
        backbone = backbone_of(pretrained.architecture["backbone"])
        encoder = encoder_of(self.network)
        report = load_encoder(encoder, pretrained, minimum_fraction=backbone.minimum_fraction)
        differences = network_of(backbone, entry).differences(pretrained.architecture, entry)
        for line in (str(report), *differences):
            self.print_to_log_file(line)
        fractions = {"loaded_fraction": report.fraction}
        if self.settings.decoder == "pretrained":
            of_decoder = load_decoder(unwrapped(self.network).get_submodule("decoder"), pretrained)
            self.print_to_log_file(str(of_decoder))
            fractions["decoder_loaded_fraction"] = of_decoder.fraction
        if spacing := (pretrained.preprocessing or {}).get("spacing"):
            self.print_to_log_file(f"Spacing in pre-training {spacing}, here {self.configuration_manager.spacing} (mm)")
        self.plans_manager.plans[SECTION]["pretrained"] = source | {
            "origin": pretrained.origin,
            "method": pretrained.method,
            "step": pretrained.step,
            **fractions,
        }

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build nnU-Net's network of the plans; outputs that nothing will supervise do not ask for gradients.

        DistributedDataParallel would wait for them.
        """
        network = AugmentsOnDevice.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        if not enable_deep_supervision and hasattr(network.decoder, "seg_layers"):
            network.decoder.seg_layers[:-1].requires_grad_(False)
        return network

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """The grids of a network's outputs, as shares of the patch: nnU-Net's for its own network, else its own."""
        strides = getattr(unwrapped(self.network).decoder, "output_strides", None)
        if not self.enable_deep_supervision or strides is None:
            return super()._get_deep_supervision_scales()
        return [[math.ceil(n / stride) / n for n in self.configuration_manager.patch_size] for stride in strides]

    def on_train_start(self) -> None:
        if self.local_rank == 0:
            remove_leftovers(Path(self.output_folder))  # a killed job's half of a checkpoint is as large as one
        super().on_train_start()

    # ---- optimization ------------------------------------------------------------------------------------------------

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.settings.loss == "dice_ce":
            return loss
        batch_dice = self.configuration_manager.batch_dice
        return with_hardest_voxels(loss, self.label_manager, batch_dice=batch_dice, ddp=self.is_ddp)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, StepSchedule]:
        lr, slower = self.settings.lr, self.settings.schedule == "paper" and not self.from_scratch
        encoder_lr = self.settings.encoder_lr or (0.1 * lr if slower else lr)
        optimizer = build_optimizer(unwrapped(self.network), lr, encoder_lr, self.settings.optimizer)
        return optimizer, StepSchedule(optimizer, self.schedule, self.num_iterations_per_epoch)

    def on_train_epoch_start(self) -> None:
        self.step_in_epoch = 0
        self._prepare_step()
        super().on_train_epoch_start()
        encoder_of(self.network).train(self.encoder_trainable)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._prepare_step()
        self.step_in_epoch += 1
        cases, batch = batch.get("keys", []), self.augmented(batch)
        data = batch["data"].to(self.device, non_blocking=True)
        if self.subsets is not None:
            data = self.subsets.keep_some(data, cases)
        target = _on_device(batch["target"], self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            loss = self.loss(self.network(data), target)
        if self.grad_scaler is None:
            loss.backward()
            self._check_encoder()
            nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP[self.settings.optimizer])
            self.optimizer.step()
        else:
            self.grad_scaler.scale(loss).backward()
            self._check_encoder()
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP[self.settings.optimizer])
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        return {"loss": loss.detach().cpu().numpy()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        losses = [float(output["loss"]) for output in train_outputs]
        with exit_on_user_error():
            refuse_lost_epoch(losses, self.current_epoch, self.is_ddp)
        super().on_train_epoch_end(train_outputs)

    def _prepare_step(self) -> None:
        """Set learning rates for the coming step, and freeze or unfreeze the encoder when its time has come."""
        step = self.current_epoch * self.num_iterations_per_epoch + self.step_in_epoch
        self.lr_scheduler.set_step(step)
        if self.encoder_trainable != (step >= self.schedule.freeze_steps):
            self.encoder_trainable = not self.encoder_trainable
            self.network = with_trainable_encoder(self.network, self.encoder_trainable)
            self.encoder_checked = False
            self.print_to_log_file(f"Step {step}: encoder {'unfrozen' if self.encoder_trainable else 'frozen'}")

    def _check_encoder(self) -> None:
        """After the first backward pass that should train the encoder, see that it has."""
        if self.encoder_trainable and not self.encoder_checked:
            with exit_on_user_error():
                check_gradients({"encoder": encoder_of(self.network)})
            self.encoder_checked = True

    def on_epoch_end(self) -> None:
        if self.current_epoch >= self.num_epochs - self.settings.averaged_epochs:
            self.average = with_weights_of(self.average, unwrapped(self.network))
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Let the final checkpoint and the validation have the mean of the late weights, where it is asked for."""
        if self.average is not None:
            unwrapped(self.network).load_state_dict(self.average.module.state_dict())
            epochs = int(self.average.n_averaged)
            self.print_to_log_file(f"The final weights are the mean of those after each of the last {epochs} epochs")
            self.average = None  # or continuing the finished training would go on with it
        super().on_train_end()

    # ---- data and files ----------------------------------------------------------------------------------------------

    def do_split(self) -> tuple[list[str], list[str]]:
        train, validation = super().do_split()
        if self.settings.fraction < 100:
            kept = nested_subset(train, self.settings.fraction, self.settings.seed)
            self.print_to_log_file(f"Training on {len(kept)} of {len(train)} cases ({self.settings.fraction} %)")
            train = kept
        return train, validation

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        train, validation = super().get_tr_and_val_datasets()
        if self.settings.channels != "all":
            with exit_on_user_error():
                names = channel_names(self.dataset_json)
                self.subsets = ChannelSubsets(train, names, self.settings.channel_drop)
            self.print_to_log_file(f"{self.subsets}. In each sample some of a case's channels are left out.")
        return train, validation

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        with written_beside(filename) as temporary:
            super().save_checkpoint(str(temporary))
            if self.average is not None:
                add_average(self.average, temporary)


def _on_device(target: torch.Tensor | list[torch.Tensor], device: torch.device) -> torch.Tensor | list[torch.Tensor]:
    """Move the target, or with deep supervision the targets at all scales."""
    if isinstance(target, list):
        return [scale.to(device, non_blocking=True) for scale in target]
    return target.to(device, non_blocking=True)


def _model_folder(trainer: str, plans: dict[str, Any], configuration: str) -> Path:
    name = convert_trainer_plans_config_to_identifier(trainer, plans["plans_name"], configuration)
    return folder_of("nnUNet_results") / plans["dataset_name"] / name


def _class_name(entry: dict[str, Any]) -> str:
    return entry["network_class_name"].rsplit(".", 1)[-1]
