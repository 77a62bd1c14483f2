"""Linear layers that multiply with packed matrices, as modules and as an operator of torch.

The operator is ``torch.ops.anyquant.matmul``, which ``torch.export`` keeps as it is. Importing this registers it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import nn

from anyquant import ir
from anyquant.errors import UsageError
from anyquant.runtime import native
from anyquant.runtime.native_matmul import PackedMatrix

ALONE = 4 << 20
"""Bytes of a matrix, times rows of activations, up to which one thread multiplies. torch's threads look for more work
for longer than such a product takes, in the way of ours: with 2 threads on 2 cores SmolLM2 writes a fifth as fast."""


@torch.library.custom_op("anyquant::matmul", mutates_args=(), device_types="cpu")
def matmul(x: torch.Tensor, packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Activations times a transposed packed matrix, in FP32.

    Args:
        x: float32 [..., in], on the CPU.
        packed: uint8, what :class:`~anyquant.runtime.native_matmul.PackedMatrix` holds.
        rows: outputs of the matrix.

    Returns:
        float32 [..., rows].

    Raises:
        ValueError: another dtype, or memory that does not begin at the border of a cache line.
        MachineError: the compiled library is not available.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"expected float32 activations, not {x.dtype}")
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    batch = x.numel() // max(1, x.shape[-1])
    nbytes = native.library().aq_matmul_workspace(packed.data_ptr(), batch)
    workspace = torch.empty(nbytes, dtype=torch.uint8)  # torch aligns to cache lines
    native.call(
        "aq_matmul", f"{batch} rows by a packed matrix", packed.data_ptr(), x.data_ptr(), batch,
        workspace.data_ptr(), nbytes, y.data_ptr(), torch.get_num_threads() if packed.numel() * batch > ALONE else 1,
    )  # fmt: skip
    return y


@matmul.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


class PackedLinear(nn.Module):
    """In the place of ``nn.Linear``: inference on the CPU, computed in FP32.

    Attributes:
        in_features: as of nn.Linear.
        out_features: likewise.
        packed: uint8, the matrix.
        bias: none, or [out_features].
    """

    packed: torch.Tensor

    def __init__(self, matrix: PackedMatrix, bias: torch.Tensor | None) -> None:
        """Take over a packed matrix."""
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("packed", torch.from_numpy(matrix.packed))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out_features] of [..., in_features], in the dtype of x.

        Raises:
            UsageError: the activations lie on another device, or have another width.
        """
        if x.device.type != "cpu" or x.shape[-1] != self.in_features:
            raise UsageError(
                f"this layer takes activations [..., {self.in_features}] on the CPU, not {list(x.shape)} on "
                f'{x.device}. For a GPU load with device="cuda", for others with dequantize=True.'
            )
        y: torch.Tensor = torch.ops.anyquant.matmul(x.float(), self.packed, self.out_features)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What the module prints."""
        bits = 8 * self.packed.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits:.3f}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        """Leave the packed matrix where and as it is: another dtype or device means nothing to it."""
        packed = self.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed = packed
        return self


def packed_linear(tensor: ir.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The layer for a tensor of a kind that can be packed."""
    return PackedLinear(PackedMatrix(tensor), bias)


def replace_linears(
    model: nn.Module,
    names: Iterable[str],
    read: Callable[[str], ir.Tensor],
    make: Callable[[ir.Tensor, torch.Tensor | None], nn.Module] = packed_linear,
) -> None:
    """Put packed matrices in the place of linear layers.

    Args:
        model: whose modules are replaced.
        names: of the layers' weights.
        read: gives the tensor of a name, of a kind that can be packed; each is packed before the next one is read.
        make: gives the layer of a tensor and a bias.
    """
    for name in names:
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        module = model.get_submodule(path)
        bias = module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        setattr(model.get_submodule(parent), leaf, make(read(name), bias))


def replaceable(model: nn.Module, names: Container[str]) -> list[str]:
    """Those of some names that are weights of plain linear layers, which nothing else shares."""
    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    return [
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is nn.Linear and f"{path}.weight" in names and shared[id(module.weight)] == 1
    ]
