"""Compile the Triton kernels of window attention for a GPU that is not there."""

from __future__ import annotations

import inspect

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunet_ssl.architectures import window_kernels, window_operator

KERNELS = ("build_table", "attend", "attend_backward", "table_backward", "bias_backward")

SCALARS = {"scale": "fp32", "root": "fp32", "penalty": "fp32"} | dict.fromkeys(window_kernels.SIZES, "i32")
WHOLE_NUMBERS = ("tokens", "kind_of", "kinds", "layouts", "groups")
IN_THE_TYPE = ("qkv", "padding", "table", "out", "d_out", "d_qkv")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_kernel(name: str, generation: int, dtype: str, size: int) -> triton.compiler.CompiledKernel:
    """Compile a kernel as the operator calls it: for compute capability `generation` / 10, a type and a head size."""
    tile = tiles(generation, dtype, size, name)
    constants = {"M": tile[0], "N": tile[1], "D": size}
    kernel, signature, attributes = getattr(window_kernels, name), {}, {}
    for place, parameter in enumerate(inspect.signature(kernel.fn).parameters):
        if parameter in constants:
            signature[parameter] = "constexpr"
        elif parameter in SCALARS:
            signature[parameter] = SCALARS[parameter]
        else:
            kind = "i32" if parameter in WHOLE_NUMBERS else dtype if parameter in IN_THE_TYPE else "fp32"
            signature[parameter] = f"*{kind}"
            attributes[place,] = [["tt.divisibility", 16]]
    constants = {key: value for key, value in constants.items() if key in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", generation, 32), options={"num_warps": 4, "num_stages": 1})


def tiles(generation: int, dtype: str, size: int, name: str) -> tuple[int, int]:
    """What :func:`nnunet_ssl.architectures.window_operator.tiles_for` would choose there."""
    if name not in window_operator.Tiles._fields:
        return window_operator.TABLE_TILE
    if dtype == "fp32":
        chosen = window_operator.TILES_IN_FLOAT32[size]
    elif size in window_operator.TILES:
        chosen = window_operator.TILES[size]
    else:
        chosen = window_operator.TILES_OF_64["Hopper" if generation >= 90 else "Ampere, Ada"]
    return getattr(chosen, name)
