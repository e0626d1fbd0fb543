"""The configurations of the kernels of per-sample shares whose machine code aot.py reads: layers of
ResNet-18 on images of 32 x 32 pixels, and what else takes another path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastsmooth.kernels import affine_grads, conv_tile, row_noise
from fastsmooth.kernels.conv_tile import Layer


def layer(C: int, p: int, size: int, kernel: int = 3, stride: int = 1) -> Layer:
    """Of images size x size, padded by half a kernel."""
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    pairs = [(n, n) for n in (kernel, stride, pad, 1)]
    return Layer(C, p, 1, size, size, out, out, *pairs)


LAYERS = {
    "3-64 32x32": layer(3, 64, 32),
    "64-64 32x32": layer(64, 64, 32),
    "128-128 16x16": layer(128, 128, 16),
    "512-512 4x4": layer(512, 512, 4),
    "512-100 1x1": layer(512, 100, 1, kernel=1),
}
MODES = {
    "norms": conv_tile.NORMS,
    "noise": conv_tile.NOISE,
    "rows": conv_tile.ROWS,
    "spread": conv_tile.SPREAD,
}
# of operands: dtype, and how products of float32 are made
OPERANDS = {
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp32": (torch.float32, "ieee"),
}


class ShareCase(NamedTuple):
    """One configuration: a layer of LAYERS and a mode of MODES for conv_tile, an order of memory
    for affine_grads."""

    kernel: str
    operands: str
    layer: str = ""
    mode: str = ""

    def __str__(self) -> str:
        return " ".join(word for word in (self.layer, self.mode, self.operands) if word)

    @property
    def multiplies(self) -> bool:
        """Whether products are made by tensor cores."""
        if self.kernel != "conv_tile" or self.operands == "fp32":
            return False
        return LAYERS[self.layer].T >= conv_tile.LEAST


CASES = [
    *(
        ShareCase("conv_tile", operands, name, mode)
        for name, mode, operands in (
            ("3-64 32x32", "norms", "bf16"),
            ("64-64 32x32", "rows", "bf16"),
            ("128-128 16x16", "norms", "bf16"),
            ("128-128 16x16", "noise", "bf16"),
            ("128-128 16x16", "spread", "bf16"),
            ("512-512 4x4", "norms", "bf16"),
            ("512-512 4x4", "noise", "bf16"),
            ("512-512 4x4", "spread", "bf16"),
            ("512-100 1x1", "norms", "bf16"),
            ("128-128 16x16", "norms", "tf32"),
            ("128-128 16x16", "noise", "tf32"),
            ("512-512 4x4", "noise", "tf32"),
            ("128-128 16x16", "noise", "tf32x3"),
            ("128-128 16x16", "noise", "fp32"),
        )
    ),
    ShareCase("conv_join", "fp32"),
    ShareCase("row_noise", "fp32"),
    *(
        ShareCase("affine_grads", operands, mode=order)
        for order in ("channels last", "pixels last", "tokens")
        for operands in ("bf16", "fp32")
    ),
]


class Compiled(NamedTuple):
    """What is compiled: the kernel, the types of its arguments and their constants, warps, and the
    tile that is taken at a time."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    tile: list[int]
    divisible: list[str]  # arguments that are numbers and divisible by 16


def launch(case: ShareCase) -> Compiled:
    dtype, precision = OPERANDS[case.operands]
    operand = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    if case.kernel == "conv_tile":
        some, mode = LAYERS[case.layer], MODES[case.mode]
        cut = conv_tile.tile(some, dtype, precision, mode)
        types = {"x": operand, "dy": operand, "start": "*fp32", "out": "*fp32", "sums": "*fp32"}
        constants = conv_tile.constants(some, cut, mode, precision)
        tile = [cut.BP, cut.BD, cut.BK]
        kernel = conv_tile._conv_tile_kernel
        return Compiled(kernel, types | {"B": "i32"}, constants, cut.warps, tile, [])
    if case.kernel == "conv_join":
        types = {"c": "*fp32", "E": "*fp32", "dw": "*fp32", "away": "*fp64"}
        types |= {"B": "i32", "parts": "i32"}
        constants = {"N": LAYERS["128-128 16x16"].weights, "COLUMNS": conv_tile.JOINED}
        kernel = conv_tile._conv_join_kernel
        return Compiled(kernel, types, constants, 4, [conv_tile.JOINED], [])
    if case.kernel == "row_noise":
        types = {"G": "*fp32", "total": "*fp32", "sums": "*fp64", "B": "i32", "P": "i32"}
        tile = [row_noise.ROWS, row_noise.COLUMNS]
        constants = {"ROWS": tile[0], "COLUMNS": tile[1]}
        kernel = row_noise._row_noise_kernel
        return Compiled(kernel, types, constants, row_noise.WARPS, tile, ["P"])
    types = {"x": operand, "dy": operand, "mean": "*fp32", "rstd": "*fp32", "sums": "*fp64"}
    numbers = ["T", "C", "G"]
    tokens = case.mode == "tokens"  # whose statistics are their own
    last = tokens or case.mode == "channels last"
    shape = affine_grads.tile(1024, 64, last)
    constants = {"of_samples": tokens, "of_pixels": tokens, "channels_last": last}
    constants |= {"BT": shape.BT, "BC": shape.BC, "SPAN": affine_grads.SPAN}
    types |= dict.fromkeys(numbers, "i32")
    kernel = affine_grads._affine_grads_kernel
    return Compiled(kernel, types, constants, affine_grads.WARPS, list(shape), numbers)
