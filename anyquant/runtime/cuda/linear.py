"""Linear layers on a GPU that multiply with quantized matrices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from anyquant.errors import MachineError, UsageError
from anyquant.ir import AffineSpec, BlockSpec, CodebookSpec, GGMLSpec, Tensor
from anyquant.runtime.cuda import reference
from anyquant.runtime.cuda.layout import pack_codebook
from anyquant.runtime.cuda.machine import TYPES, machine
from anyquant.runtime.cuda.products import MOST_EXACT_ROWS, MOST_ROWS, Type, expand, multiply


class _QuantizedLinear(nn.Module):
    """What the layers share: in the place of ``nn.Linear``, for inference, on the GPU that their memory lies on.

    Attributes:
        in_features: as of nn.Linear.
        out_features: likewise.
        bias: none, or [out_features].
    """

    def __init__(self, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out_features] of [..., in_features], in the dtype of x: float32, float16 or bfloat16.

        Raises:
            UsageError: the activations are of another dtype, lie elsewhere than the matrix, or have another width; or
                the matrix is on no GPU.
            MachineError: the GPU cannot run the kernels, or has too little memory.
        """
        home = next(self.buffers()).device
        if x.dtype not in TYPES or x.device != home or x.shape[-1] != self.in_features:
            raise UsageError(
                f"this layer takes float32, float16 or bfloat16 activations [..., {self.in_features}] on {home}, where "
                f"it is, not {x.dtype} {list(x.shape)} on {x.device}."
            )
        rows = x.reshape(-1, self.in_features).contiguous()
        try:
            y = self._product(rows) if len(rows) else rows.new_empty(0, self.out_features)
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"{home} has no room for {len(rows)} rows of activations times a matrix "
                f"[{self.out_features}, {self.in_features}]: {error}"
            ) from error
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What the module prints."""
        stored = sum(buffer.numel() for buffer in self.buffers())
        bits = 8 * stored / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits:.3f}"


class CodebookLinear(_QuantizedLinear):
    """Multiplies with a packed codebook matrix; with many rows of activations, with its dequantized weights."""

    packed: torch.Tensor

    def __init__(self, tensor: Tensor, bias: torch.Tensor | None) -> None:
        """Repack a codebook tensor, which is not needed after that; on the CPU until the module is moved."""
        layout, packed = pack_codebook(tensor)
        super().__init__(layout.shape, bias)
        self.layout = layout
        self.register_buffer("packed", torch.from_numpy(packed))

    def weights(self, dtype: torch.dtype) -> torch.Tensor:
        """Dequantized weights [out, in] where the matrix lies, in float32, float16 or bfloat16."""
        weight = torch.empty(self.layout.shape, dtype=dtype, device=self.packed.device)
        expand(machine(self.packed.device), self.layout, self.packed, TYPES[dtype], weight)
        return weight

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > MOST_ROWS:
            return nn.functional.linear(x, self.weights(x.dtype))
        gpu, kind = machine(x.device), TYPES[x.dtype]
        y, step = x.new_empty(len(x), self.out_features), MOST_EXACT_ROWS if kind is Type.FP32 else MOST_ROWS
        for first in range(0, len(x), step):
            some = x[first : first + step]
            multiply(gpu, self.layout, self.packed, some, kind, len(some), y[first : first + step])
        return y


class BlockLinear(_QuantizedLinear):
    """Multiplies with what the reference kernels dequantize, each time: of the kinds block, affine and ggml."""

    def __init__(self, tensor: Tensor, bias: torch.Tensor | None) -> None:
        """Take over the stored arrays; on the CPU until the module is moved."""
        assert isinstance(tensor.spec, BlockSpec | AffineSpec | GGMLSpec)
        super().__init__(tensor.spec.shape, bias)
        self.spec = tensor.spec
        for name, array in reference.stored_arrays(tensor).items():
            # As bytes: no change of the model's dtype may change them.
            self.register_buffer(f"stored_{name}", torch.from_numpy(_bytes(array)))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.empty(self.spec.shape, dtype=torch.float32, device=x.device)
        stored = {name.removeprefix("stored_"): buffer for name, buffer in self.named_buffers()}
        reference.dequantize(machine(x.device), self.spec, stored, weight)
        return nn.functional.linear(x, weight.to(x.dtype))


def quantized_linear(tensor: Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The layer for a tensor of one of :data:`anyquant.runtime.cuda.reference.KINDS`."""
    return CodebookLinear(tensor, bias) if isinstance(tensor.spec, CodebookSpec) else BlockLinear(tensor, bias)


def _bytes(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
