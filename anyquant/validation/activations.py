"""Quantized activations, simulated in PyTorch: what W6A6 costs a model, not how fast it would run.

Source: Zhang et al., "Revisiting Block-based Quantisation: What is Important for Sub-8-bit LLM Inference?"
(arXiv 2310.05079), sections 3 and 4. In every decoder block the inputs of all linear layers and both operands of both
attention products, Q K^T and A V, are rounded to block floating point; embeddings, norms, softmax and the output head
stay float, and so do biases and the sines of rotary positions, which the authors' code rounds to 8 bits. Weights are
left as they are: an IR's are quantized already.

Blocks lie along the reduction dimension of each product (the columns of a weight, the head dimension of Q and K, the
tokens of A and V), as only then a product of two blocks is an integer dot product and one addition of exponents. The
authors' simulation blocks the second operand along its last dimension instead: K^T along tokens, V along the head
(``axes="last"``).
A block of V spans tokens, so within a window its exponent is known to the up to block - 1 tokens before the last one
of the block; with a cache the open block is rounded anew for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from anyquant.calibration.blocks import decoder_blocks
from anyquant.errors import InputError, UnknownArchitecture
from anyquant.validation.activation_formats import ActivationFormat, activation_format

# Products of two tensors: where the operands stand among the arguments.
_LINEAR = torch.nn.functional.linear
_PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    _LINEAR: ((0, "input"), (1, "weight")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.Tensor.mm: ((0, "self"), (1, "mat2")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    torch.Tensor.bmm: ((0, "self"), (1, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.Tensor.addmm: ((1, "mat1"), (2, "mat2")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")),
    torch.Tensor.baddbmm: ((1, "batch1"), (2, "batch2")),
}
# Products whose operands are not to be seen: a model that has one in a block would be rounded in part only.
_OPAQUE = {
    torch.nn.functional.scaled_dot_product_attention,
    torch.nn.functional.multi_head_attention_forward,
    torch.einsum,
    torch.tensordot,
    *(getattr(owner, name) for owner in (torch, nn.functional) for name in ("_grouped_mm", "grouped_mm")
      if hasattr(owner, name)),
}  # fmt: skip


@dataclass
class Caught:
    """Products that were seen since the context was entered, per decoder block.

    Attributes:
        linear: of an activation with a weight.
        attention: of two activations.
    """

    linear: list[int]
    attention: list[int]


def round_to_bfp(x: torch.Tensor, width: int, block: int = 16) -> torch.Tensor:
    """Nearest BFP values of a tensor, blocks along the last dimension: what the method ``block`` makes of weights.

    The exponent e of a block is ceil(log2 max |x|) in -127..127; values are k * 2**(e - width + 1) with integers
    |k| < 2**(width - 1), ties to even.

    Args:
        x: float [..., n]; the last block may be shorter. Rounded in float32.
        width: bits, 2 to 8, one of them the sign.
        block: elements that share an exponent.

    Returns:
        A new tensor of the shape and dtype of ``x``. A block that holds NaN or Inf becomes NaN.
    """
    n = x.shape[-1]
    padded = nn.functional.pad(x.float(), (0, -n % block)) if n % block else x.float()
    blocks = padded.reshape(*padded.shape[:-1], -1, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)
    # max = mantissa * 2**exponent, mantissa in [.5, 1): the exponent is ceil(log2 max), but one less for a power of 2.
    exponent = (exponent - (mantissa == 0.5).int()).clamp_(-127, 127)
    down, up = _powers_of_two(width - 1 - exponent)
    down[0].masked_fill_(~torch.isfinite(largest), torch.nan)
    k = (blocks * down[0]).mul_(down[1]).round_()  # ties to even
    most = (1 << (width - 1)) - 1
    values = k.clamp_(-most, most).mul_(up[0]).mul_(up[1]).add_(0.0)  # no negative zeros
    return values.reshape(padded.shape)[..., :n].to(x.dtype)


def _powers_of_two(
    exponent: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Two float32 factors of 2**exponent, and their reciprocals: the power itself may be no normal number."""
    half = exponent >> 1
    parts = (half, exponent - half)

    def power(n: torch.Tensor) -> torch.Tensor:
        return ((n + 127) << 23).view(torch.float32)  # exact, as pow need not be

    return (power(parts[0]), power(parts[1])), (power(-parts[0]), power(-parts[1]))


def every_product(name: str) -> bool:
    """Round the operands of all products."""
    return True


@contextmanager
def quantized_activations(
    model: Any,
    name: str | ActivationFormat,
    block: int = 16,
    *,
    products: Callable[[str], bool] = every_product,
    axes: Literal["reduction", "last"] = "reduction",
) -> Iterator[Caught]:
    """While this lasts, a model computes with quantized activations.

    Attention and experts are switched to their plain ("eager") implementation, in which all products are visible.
    Every forward pass checks that both attention products of every decoder block it runs through were seen.

    Args:
        model: a transformers ``PreTrainedModel`` that decodes, on any device.
        name: of the format, "bfp2" to "bfp8".
        block: elements that share an exponent, 16 or 32; not used where ``name`` is a format.
        products: which to round the operands of, by the name of the weight in its block, such as
            "self_attn.q_proj.weight"; Q K^T is "scores" and A V is "values". Experiments alone need it.
        axes: along which operands of attention lie in blocks: the one summed over, or each one's last, which is what
            the authors simulate.

    Yields:
        The number of products seen so far.

    Raises:
        UsageError: there is no such format.
        InputError: from a forward pass: a decoder block has products that cannot be rounded, or no attention; on
            leaving: a decoder block was never run.
        UnknownArchitecture: the model has no list of decoder blocks.
    """
    chosen = name if isinstance(name, ActivationFormat) else activation_format(name, block)
    try:
        _, blocks = decoder_blocks(model, type(model).__name__)
    except UnknownArchitecture:
        raise UnknownArchitecture(
            f"{type(model).__name__} keeps no list of decoder blocks, so it is not known which of its products have "
            "quantized activations. Validate without --activations."
        ) from None
    caught = Caught([0] * len(blocks), [0] * len(blocks))
    passes = 0

    def call(number: int, mode: _Rounding, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        mode.linear = mode.attention = 0
        with mode:
            output = forward(*args, **kwargs)
        if mode.attention < 2 or mode.linear < 1:
            raise _invisible(number, f"{mode.linear} linear layers and {mode.attention} attention products were seen")
        caught.linear[number] += mode.linear
        caught.attention[number] += mode.attention
        return output

    replaced = [vars(module).get("forward") for module in blocks]
    with _eager(model):
        for number, module in enumerate(blocks):
            rounding = _Rounding(module, number, chosen, products, axes == "last")
            module.forward = partial(call, number, rounding, module.forward)
        try:
            yield caught
        finally:
            for module, before in zip(blocks, replaced, strict=True):
                if before is None:
                    del module.forward  # the instance's; the class has the model's own
                else:
                    module.forward = before
        silent = [number for number, count in enumerate(caught.linear) if not count]
        if passes and silent:
            raise _invisible(silent[0], "it was not run, though others were")


class _Rounding(TorchFunctionMode):
    """Rounds the operands of all products of one decoder block that are no weights."""

    def __init__(
        self,
        module: nn.Module,
        number: int,
        chosen: ActivationFormat,
        products: Callable[[str], bool],
        last: bool,
    ) -> None:
        super().__init__()
        self._number, self._format, self._products, self._last = number, chosen, products, last
        self._weights = {part.untyped_storage().data_ptr(): name for name, part in module.named_parameters()}
        self._constants = {buffer.untyped_storage().data_ptr() for buffer in module.buffers()}
        self.linear = self.attention = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, a product with rounded operands."""
        kwargs = kwargs or {}
        if func in _OPAQUE:
            raise _invisible(self._number, f"it calls {func.__name__}, which hides its operands")
        places = _PRODUCTS.get(func)
        if places is None:
            return func(*args, **kwargs)
        operands: list[torch.Tensor] = [args[at] if at < len(args) else kwargs[name] for at, name in places]
        storages = [operand.untyped_storage().data_ptr() for operand in operands]
        if not self._constants.isdisjoint(storages):  # rotary frequencies times positions
            return func(*args, **kwargs)
        weights = [self._weights.get(storage) for storage in storages]
        name = weights[0] or weights[1] or ("values" if self.attention % 2 else "scores")
        if any(weights):
            self.linear += 1
        elif min(operand.ndim for operand in operands) >= 3:
            self.attention += 1
        else:
            shapes = " with ".join(str(list(operand.shape)) for operand in operands)
            raise _invisible(
                self._number, f"it multiplies {shapes}, neither of them a weight, and this is no attention"
            )
        if not self._products(name):
            return func(*args, **kwargs)
        positional = list(args)
        second = -1 if func is _LINEAR or (self._last and not any(weights)) else -2
        for (at, key), operand, weight, axis in zip(places, operands, weights, (-1, second), strict=True):
            value = operand if weight else self._rounded(operand, axis)
            if at < len(args):
                positional[at] = value
            else:
                kwargs = {**kwargs, key: value}
        return func(*positional, **kwargs)

    def _rounded(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Blocks along an axis; the only one of a vector."""
        if axis == -1 or x.ndim == 1:
            return round_to_bfp(x, self._format.width, self._format.block)
        return round_to_bfp(x.transpose(-1, -2), self._format.width, self._format.block).transpose(-1, -2)


def _invisible(number: int, why: str) -> InputError:
    return InputError(
        f"activations of decoder block {number} cannot be quantized: {why}. The paper's scheme is for blocks of linear "
        "layers and an attention of two products; validate this model without --activations."
    )


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention and experts as plain products, for as long as this lasts.

    Models read their configuration in every forward pass. One that does not keeps what it was loaded with, and is
    refused for the first product that it hides.
    """
    names = [name for name in ("_attn_implementation", "_experts_implementation") if hasattr(model.config, name)]
    before = {name: getattr(model.config, name) for name in names}
    try:
        for name in names:
            setattr(model.config, name, "eager")
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
