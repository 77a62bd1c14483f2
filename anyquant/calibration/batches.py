"""A decoder block's call, for a few of the windows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

TOKENS = 1024
"""That go through a block at once: enough for fast products, few enough to hold all they leave behind."""
FEW_TOKENS = 256
"""The same where memory counts for more."""


class BatchedCall:
    """What a model passes to one of its blocks for all windows, and how to call the block for some of them."""

    def __init__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, few: bool = False
    ) -> None:
        """Take over the arguments of a block but the hidden states, which are the first or ``hidden_states``."""
        self._forward, self._positional = forward, bool(args)
        hidden = args[0] if args else kwargs["hidden_states"]
        self._windows = len(hidden)
        self._args = args[1:]
        self._kwargs = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
        # Arguments laid out in another way than [windows or 1, ...] cannot be divided.
        self._divisible = _divisible([self._args, self._kwargs], self._windows)
        tokens = FEW_TOKENS if few else TOKENS
        self._step = max(1, tokens // hidden.shape[1]) if self._divisible else self._windows

    @staticmethod
    def hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden states [windows, window, hidden] among the arguments."""
        tensor: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        return tensor

    def batches(self, windows: int | None = None) -> Iterator[slice]:
        """Yield the windows of each batch; only the first few windows if so many are enough, and can be divided off."""
        last = windows if windows is not None and self._divisible else self._windows
        for start in range(0, last, self._step):
            yield slice(start, min(start + self._step, last))

    def __call__(self, hidden: torch.Tensor, windows: slice) -> Any:
        """What the block returns for the hidden states of these windows."""
        args, kwargs = _divide((self._args, self._kwargs), windows, self._windows)
        return (
            self._forward(hidden, *args, **kwargs)
            if self._positional
            else self._forward(hidden_states=hidden, **kwargs)
        )


def first(result: Any) -> torch.Tensor:
    """The hidden states in what a block returns, which may be a tuple."""
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def _divide(value: Any, windows: slice, count: int) -> Any:
    """The part of an argument that belongs to some windows; what has no axis of windows stays as it is."""
    if isinstance(value, torch.Tensor):
        return value[windows] if value.ndim > 1 and len(value) == count and count > 1 else value
    if isinstance(value, dict):
        return {key: _divide(each, windows, count) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_divide(each, windows, count) for each in value)
    return value


def _divisible(value: Any, count: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim < 3 or len(value) in (1, count)
    if isinstance(value, dict):
        return all(_divisible(each, count) for each in value.values())
    if isinstance(value, tuple | list):
        return all(_divisible(each, count) for each in value)
    return True
