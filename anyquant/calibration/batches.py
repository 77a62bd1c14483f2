"""A decoder block's call, for a few of the windows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

TOKENS = 1024
"""That go through a block at once: enough for fast products, few enough to hold all they leave behind."""
FEW_TOKENS = 256
"""The same where memory counts for more."""

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Arguments = tuple[Args, Kwargs]


class BatchedCall:
    """What a model passes to one of its blocks for all windows, and how to call the block for some of them."""

    def __init__(
        self, forward: Callable[..., Any], args: Args, kwargs: Kwargs, single: Arguments, *, few: bool = False
    ) -> None:
        """Take over the arguments of a block but the hidden states, which are the first or ``hidden_states``.

        Args:
            forward: the block's.
            args: by position, for all windows.
            kwargs: by name, likewise.
            single: arguments for one window, of this block or another. What differs from them has an axis of windows;
                lengths alone do not tell, as a model may have as many heads as there are windows.
            few: whether memory counts for more than speed.
        """
        self._forward, self._positional = forward, bool(args)
        hidden = self.hidden(args, kwargs)
        self._windows = len(hidden)
        self._rest, self._single = _but_hidden(args, kwargs), _but_hidden(*single)
        # Arguments laid out in another way than [windows, ...], or the same for all windows, cannot be divided.
        self._divisible = _divisible(self._rest, self._single, self._windows)
        tokens = FEW_TOKENS if few else TOKENS
        self._step = max(1, tokens // hidden.shape[1]) if self._divisible else self._windows

    @staticmethod
    def hidden(args: Args, kwargs: Kwargs) -> torch.Tensor:
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
        args, kwargs = _divide(self._rest, self._single, windows, self._windows)
        return (
            self._forward(hidden, *args, **kwargs)
            if self._positional
            else self._forward(hidden_states=hidden, **kwargs)
        )


def first(result: Any) -> torch.Tensor:
    """The hidden states in what a block returns, which may be a tuple."""
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def _but_hidden(args: Args, kwargs: Kwargs) -> Arguments:
    return args[1:], {key: value for key, value in kwargs.items() if args or key != "hidden_states"}


def _has_windows(value: torch.Tensor, single: Any, count: int) -> bool:
    """Whether the first axis is that of the windows."""
    if value.ndim == 0 or count == 1 or len(value) != count:
        return False
    if isinstance(single, torch.Tensor) and single.ndim == value.ndim:
        return len(single) == 1
    return value.ndim > 1  # nothing to compare with: the lengths have to tell


def _divide(value: Any, single: Any, windows: slice, count: int) -> Any:
    """The part of an argument that belongs to some windows; what has no axis of windows stays as it is."""
    if isinstance(value, torch.Tensor):
        return value[windows] if _has_windows(value, single, count) else value
    parts = {key: _divide(each, _part(single, key), windows, count) for key, each in _parts(value)}
    if isinstance(value, dict):
        return parts
    return type(value)(parts.values()) if type(value) in (tuple, list) else value


def _divisible(value: Any, single: Any, count: int) -> bool:
    if isinstance(value, torch.Tensor):
        if _has_windows(value, single, count):
            return True
        alike = isinstance(single, torch.Tensor) and single.shape == value.shape
        return alike or value.ndim < 3 or len(value) == 1
    return all(_divisible(each, _part(single, key), count) for key, each in _parts(value))


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """What a container of arguments holds, by key or number."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, tuple | list) else []


def _part(value: Any, key: Any) -> Any:
    """What another container holds there, None if nothing."""
    return dict(_parts(value)).get(key)
