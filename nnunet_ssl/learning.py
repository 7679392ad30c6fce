"""What is to be trained receives gradients, or the training ends: nothing else would tell that it does not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nnunet_ssl.errors import UserError


def check_gradients(parts: Mapping[str, nn.Module]) -> None:
    """Refuse to go on if some trainable parameter of `parts` has no gradient after a backward pass.

    Args:
        parts: modules, by the names a user knows them by.

    Raises:
        UserError: says which part and names a parameter.
    """
    for part, module in parts.items():
        parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        if without:
            raise UserError(
                f"{len(without)} of the {len(parameters)} tensors of the {part} received no gradient, such as "
                f"{without[0]}: the training would leave them as they are. If torch.compile is on (nnUNet_compile, or "
                "compile in a pre-training), try without it, or another release of PyTorch."
            )
